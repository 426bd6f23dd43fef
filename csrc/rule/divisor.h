#pragma once

#include <cstdint>

#include "macros.h"

namespace attn_mask {

/// Division by a number that the host knows: a GPU takes some 70 instructions for one of 64 bits,
/// and 10 for the multiplication that this makes of it (Granlund and Montgomery, round-up method).
class Divisor {
 public:
  Divisor() = default;  // of nothing yet

  /// `value` > 0.
  explicit Divisor(int64_t value) : value_(value) {
    __extension__ using Wide = unsigned __int128;
    int32_t bits = 0;  // value <= 2^bits
    while (bits < 63 && (int64_t{1} << bits) < value) {
      ++bits;
    }
    const auto divisor = static_cast<uint64_t>(value);
    const uint64_t rest = (uint64_t{1} << bits) - divisor;
    multiplier_ = static_cast<uint64_t>((static_cast<Wide>(rest) << 64) / divisor) + 1;
    first_shift_ = bits > 0 ? 1 : 0;
    second_shift_ = bits > 0 ? bits - 1 : 0;
  }

  ATTN_MASK_INLINE int64_t value() const { return value_; }

  /// `number` / value, rounded down; `number` >= 0.
  ATTN_MASK_INLINE int64_t divide(int64_t number) const {
    const auto n = static_cast<uint64_t>(number);
#if defined(__CUDA_ARCH__)
    const uint64_t high = __umul64hi(multiplier_, n);
#else
    __extension__ using Wide = unsigned __int128;
    const auto high = static_cast<uint64_t>((static_cast<Wide>(multiplier_) * n) >> 64);
#endif
    return static_cast<int64_t>((high + ((n - high) >> first_shift_)) >> second_shift_);
  }

  /// The same for any number: rounded towards minus infinity.
  ATTN_MASK_INLINE int64_t floor(int64_t number) const {
    const int64_t sign = number >> 63;
    return divide(number ^ sign) ^ sign;
  }

 private:
  int64_t value_;
  uint64_t multiplier_;
  int32_t first_shift_;
  int32_t second_shift_;
};

}  // namespace attn_mask
