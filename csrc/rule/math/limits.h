#pragma once

#include <cstddef>
#include <cstdint>

#include "macros.h"

namespace attn_mask {

/// Offsets, and positions and shifts that are read from memory, are kept within this distance of 0.
/// A position is a sum of at most three of them.
inline constexpr int64_t kFar = int64_t{1} << 59;

/// Further than any two positions are from each other, and still no overflow when it is added to
/// one: the sides of windows and the sizes of chunks are cut to it, and an open side is one.
inline constexpr int64_t kOpen = int64_t{1} << 62;

/// What the parameters of a CUDA kernel may take, all of them together, on any GPU and driver.
inline constexpr std::size_t kMaxParameterBytes = 4096;

/// `value`, or the nearest that is within kFar of 0.
ATTN_MASK_INLINE int64_t within_far(int64_t value) {
  return value > kFar ? kFar : value < -kFar ? -kFar : value;
}

}  // namespace attn_mask
