#pragma once

#include "rule/interval.h"
#include "rule/query.h"

namespace attn_mask {

/// A query attends to no key further than `left` before its own position. With Causal that makes a
/// window of `left + 1` keys, the query's own included.
struct SlidingWindow {
  int64_t left;  // >= 0

  ATTN_MASK_INLINE bool attends(const Query& query, int64_t key) const {
    return key >= query.position - left;
  }

  /// The keys of `[0, kv_length)` that the query attends to.
  ATTN_MASK_INLINE Interval span(const Query& query, int64_t kv_length) const {
    return intersect({query.position - left, kv_length}, {0, kv_length});
  }
};

}  // namespace attn_mask
