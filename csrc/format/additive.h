#pragma once

#include "format/dense.h"

namespace attn_mask {

/// Added to attention scores: 0 attends, the lowest finite number masks. (Not -inf: a row that is
/// masked throughout would become NaN in a softmax.)
inline constexpr DenseFormat additive(int32_t exponent_bits, int32_t mantissa_bits) {
  const uint64_t mantissa = (uint64_t{1} << mantissa_bits) - 1;
  const uint64_t exponent = ((uint64_t{1} << exponent_bits) - 2) << mantissa_bits;
  const uint64_t sign = uint64_t{1} << (exponent_bits + mantissa_bits);
  return {(1 + exponent_bits + mantissa_bits) / 8, 0, sign | exponent | mantissa};
}

inline constexpr DenseFormat kAdditiveFloat16 = additive(5, 10);
inline constexpr DenseFormat kAdditiveBFloat16 = additive(8, 7);
inline constexpr DenseFormat kAdditiveFloat32 = additive(8, 23);
inline constexpr DenseFormat kAdditiveFloat64 = additive(11, 52);

}  // namespace attn_mask
