#pragma once

#include <cstdint>
#include <type_traits>

#include "bits.h"

namespace attn_mask {

/// Integers in memory: signed of 1, 2, 4 or 8 bytes, or unsigned bytes.
struct Integers {
  static constexpr int32_t kUnsignedByte = 0;

  const void* data;
  int32_t width;  // bytes, or kUnsignedByte

  /// Calls `f` with `data` as a pointer to what it holds.
  template <typename F>
  ATTN_MASK_INLINE decltype(auto) visit(const F& f) const {
    if (width == kUnsignedByte) {
      return f(static_cast<const uint8_t*>(data));
    }
    return with_bits(width, [&](auto bits) ATTN_MASK_INLINE_LAMBDA -> decltype(auto) {
      return f(static_cast<const std::make_signed_t<decltype(bits)>*>(data));
    });
  }

  ATTN_MASK_INLINE int64_t at(int64_t index) const {
    return visit([&](const auto* numbers)
                     ATTN_MASK_INLINE_LAMBDA { return static_cast<int64_t>(numbers[index]); });
  }

  /// Where the integer at `index` lies.
  const void* address(int64_t index) const {
    return static_cast<const char*>(data) + index * (width == kUnsignedByte ? 1 : width);
  }
};

}  // namespace attn_mask
