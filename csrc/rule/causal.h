#pragma once

#include "rule/interval.h"
#include "rule/limits.h"

namespace attn_mask {

/// A query attends to itself and to what came before it.
struct Causal {
  /// The positions of the keys that the query at position `q` attends to.
  ATTN_MASK_INLINE Interval span(int64_t q) const { return {-kOpen, q + 1}; }
};

}  // namespace attn_mask
