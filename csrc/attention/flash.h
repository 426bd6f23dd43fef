#pragma once

#include <cstdint>
#include <optional>

#include "rule/problem.h"

namespace attn_mask::attention {

/// What a rule is to the flash kernels of GPUs: a window around the query, counted from where the
/// last query stands at the last key, and documents.
struct FlashBand {
  int64_t left;             // -1: open
  int64_t right;            // -1: open
  const SameId* documents;  // a leaf of the problem's rule; null: none
};

/// Nothing where those kernels can't say all of a rule, or where positions are data.
std::optional<FlashBand> flash_band(const Problem& problem);

}  // namespace attn_mask::attention
