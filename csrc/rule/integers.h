#pragma once

#include <cstdint>

#include "macros.h"

namespace attn_mask {

/// Integers in memory: signed of 1, 2, 4 or 8 bytes, or unsigned bytes.
struct Integers {
  static constexpr int32_t kUnsignedByte = 0;

  const void* data;
  int32_t width;  // bytes, or kUnsignedByte

  ATTN_MASK_INLINE int64_t at(int64_t index) const {
    switch (width) {
      case kUnsignedByte:
        return static_cast<const uint8_t*>(data)[index];
      case 1:
        return static_cast<const int8_t*>(data)[index];
      case 2:
        return static_cast<const int16_t*>(data)[index];
      case 4:
        return static_cast<const int32_t*>(data)[index];
      default:
        return static_cast<const int64_t*>(data)[index];
    }
  }

  /// Where the integer at `index` lies.
  const void* address(int64_t index) const {
    return static_cast<const char*>(data) + index * (width == kUnsignedByte ? 1 : width);
  }
};

}  // namespace attn_mask
