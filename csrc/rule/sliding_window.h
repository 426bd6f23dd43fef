#pragma once

#include "rule/interval.h"
#include "rule/limits.h"

namespace attn_mask {

/// A query attends to the keys from `left` before to `right` behind its own position. With Causal
/// that makes windows of `left + 1` keys, the query's own included.
struct SlidingWindow {
  int64_t left;   // kOpen: open
  int64_t right;  // kOpen: open

  /// The positions of the keys that the query at position `q` attends to.
  ATTN_MASK_INLINE Interval span(int64_t q) const { return {q - left, q + right + 1}; }
};

}  // namespace attn_mask
