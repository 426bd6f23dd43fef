#pragma once

#include <cstdint>

#include "macros.h"

namespace attn_mask {

/// The keys `begin <= k < end`; empty when `end <= begin`.
struct Interval {
  int64_t begin;
  int64_t end;

  ATTN_MASK_INLINE bool contains(int64_t key) const { return begin <= key && key < end; }
  ATTN_MASK_INLINE bool empty() const { return end <= begin; }
};

/// The keys that lie in both.
ATTN_MASK_INLINE Interval intersect(Interval a, Interval b) {
  return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}

}  // namespace attn_mask
