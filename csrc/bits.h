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

ATTN_MASK_INLINE int64_t count_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

/// The number of the lowest bit that is 1; there must be one.
ATTN_MASK_INLINE int64_t first_bit(uint64_t bits) {
#if defined(__CUDA_ARCH__)
  return __ffsll(static_cast<long long>(bits)) - 1;
#else
  return __builtin_ctzll(bits);
#endif
}

/// That of the highest.
ATTN_MASK_INLINE int64_t last_bit(uint64_t bits) {
#if defined(__CUDA_ARCH__)
  return 63 - __clzll(static_cast<long long>(bits));
#else
  return 63 - __builtin_clzll(bits);
#endif
}

}  // namespace attn_mask
