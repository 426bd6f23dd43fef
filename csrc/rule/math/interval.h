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

/// Keys to a word.
inline constexpr int64_t kWordSize = 64;

/// The lowest `count` bits; none for a negative count, all from 64 on.
ATTN_MASK_INLINE uint64_t low_bits(int64_t count) {
  return count <= 0 ? 0 : count >= kWordSize ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

/// Which of 64 keys from `first` on lie in `keys`: bit 0 is `first`.
ATTN_MASK_INLINE uint64_t word_of(Interval keys, int64_t first) {
  return low_bits(keys.end - first) & ~low_bits(keys.begin - first);
}

/// The keys that lie in both.
ATTN_MASK_INLINE Interval intersect(Interval a, Interval b) {
  return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}

}  // namespace attn_mask
