#pragma once

#include <cstdint>

#include "macros.h"

namespace attn_mask {

/// A test of one element of a mask, on its bits read as an unsigned integer: whether
/// `(bits & keep) - first <= extent`. Non-negative IEEE numbers are ordered as their bits are, so
/// that "rounds to 1", "is nonzero" and "equals the minimum" are all such ranges, and kernels need
/// one instance per element size instead of one per dtype.
struct KeyTest {
  uint64_t keep;
  uint64_t first;
  uint64_t extent;

  template <typename Bits>
  ATTN_MASK_INLINE bool operator()(Bits bits) const {
    const Bits kept = static_cast<Bits>(bits & static_cast<Bits>(keep));
    return static_cast<Bits>(kept - static_cast<Bits>(first)) <= static_cast<Bits>(extent);
  }
};

/// True for elements whose bits lie in `[first, last]`.
inline constexpr KeyTest bits_between(uint64_t first, uint64_t last) {
  return {~uint64_t{0}, first, last - first};
}

/// True for no element at all.
inline constexpr KeyTest never() { return {0, 1, 0}; }

}  // namespace attn_mask
