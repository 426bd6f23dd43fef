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
  explicit Divisor(int64_t value) : shift_(0) {
    __extension__ using Wide = unsigned __int128;
    while (shift_ < 63 && (int64_t{1} << shift_) < value) {
      ++shift_;
    }
    const auto divisor = static_cast<uint64_t>(value);
    const uint64_t rest = (uint64_t{1} << shift_) - divisor;
    multiplier_ = static_cast<uint64_t>((static_cast<Wide>(rest) << 64) / divisor) + 1;
  }

  /// `number` / value, rounded down; `number` >= 0.
  ATTN_MASK_INLINE int64_t divide(int64_t number) const {
    const auto n = static_cast<uint64_t>(number);
#if defined(__CUDA_ARCH__)
    const uint64_t high = __umul64hi(multiplier_, n);
#else
    __extension__ using Wide = unsigned __int128;
    const auto high = static_cast<uint64_t>((static_cast<Wide>(multiplier_) * n) >> 64);
#endif
    const int32_t first = shift_ > 0 ? 1 : 0;
    return static_cast<int64_t>((high + ((n - high) >> first)) >> (shift_ - first));
  }

  /// The same for any number: rounded towards minus infinity.
  ATTN_MASK_INLINE int64_t floor(int64_t number) const {
    const int64_t sign = number >> 63;
    return divide(number ^ sign) ^ sign;
  }

 private:
  uint64_t multiplier_;
  int32_t shift_;  // 2^shift_ >= value
};

}  // namespace attn_mask
