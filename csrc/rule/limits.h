#pragma once

#include <cstdint>

#include "macros.h"

namespace attn_mask {

/// Positions, offsets and window sides are kept within this distance of 0, so that sums of three of
/// them never overflow. As a side of a window it means that the side is open.
inline constexpr int64_t kFar = int64_t{1} << 60;

/// `value`, or the nearest that is within kFar of 0.
ATTN_MASK_INLINE int64_t within_far(int64_t value) {
  return value > kFar ? kFar : value < -kFar ? -kFar : value;
}

}  // namespace attn_mask
