#pragma once

#include "rule/interval.h"
#include "rule/query.h"

namespace attn_mask {

/// A query attends to itself and to what came before it.
struct Causal {
  ATTN_MASK_INLINE bool attends(const Query& query, int64_t key) const {
    return key <= query.position;
  }

  /// The keys of `[0, kv_length)` that the query attends to.
  ATTN_MASK_INLINE Interval span(const Query& query, int64_t kv_length) const {
    return intersect({0, query.position + 1}, {0, kv_length});
  }
};

}  // namespace attn_mask
