#pragma once

#include <cstdint>

namespace attn_mask {

/// The two bit patterns of a dense mask. Kernels are written for element
/// sizes, not for dtypes.
struct DenseFormat {
  int32_t element_size;  // 1, 2, 4 or 8 bytes
  uint64_t attend;
  uint64_t masked;
};

}  // namespace attn_mask
