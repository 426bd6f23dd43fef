#pragma once

#include <cstdint>

namespace attn_mask {

/// Positions, offsets and window sides are kept within this distance of 0, so that sums of three of
/// them never overflow. As a side of a window it means that the side is open.
inline constexpr int64_t kFar = int64_t{1} << 60;

}  // namespace attn_mask
