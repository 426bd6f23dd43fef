#pragma once

#include <cstdint>

#include "macros.h"

namespace attn_mask {

/// Calls `f` with a 0 of the unsigned type of `size` bytes (1, 2, 4 or 8) and returns what it does:
/// kernels are written for element sizes, not for dtypes.
ATTN_MASK_ANY_EXECUTION_SPACE
template <typename F>
ATTN_MASK_INLINE decltype(auto) with_bits(int32_t size, const F& f) {
  switch (size) {
    case 1:
      return f(uint8_t{});
    case 2:
      return f(uint16_t{});
    case 4:
      return f(uint32_t{});
    default:
      return f(uint64_t{});
  }
}

}  // namespace attn_mask
