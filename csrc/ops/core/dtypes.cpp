#include "ops/core/dtypes.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>

namespace attn_mask {
namespace {

/// Calls `f` with a number of an additive dtype.
template <typename F>
auto visit(at::ScalarType dtype, F f) {
  switch (dtype) {
    case at::kHalf:
      return f(c10::Half());
    case at::kBFloat16:
      return f(c10::BFloat16());
    case at::kFloat:
      return f(float());
    case at::kDouble:
      return f(double());
    default:
      TORCH_INTERNAL_ASSERT(false, "no additive mask of ", dtype);
  }
}

/// The bits of `value` in a floating dtype.
uint64_t bits_in(at::ScalarType dtype, double value) {
  return visit(dtype, [&](auto number) -> uint64_t {
    using Bits = std::conditional_t<sizeof(number) == 2, uint16_t,
                                    std::conditional_t<sizeof(number) == 4, uint32_t, uint64_t>>;
    number = static_cast<decltype(number)>(value);
    return std::bit_cast<Bits>(number);
  });
}

int32_t mantissa_bits(at::ScalarType dtype) {
  return visit(dtype,
               [](auto of) -> int32_t { return std::numeric_limits<decltype(of)>::digits - 1; });
}

/// The least integer that, rounded to float32, is at least `bound`.
int64_t first_rounding_to(float bound) {
  int64_t low = std::numeric_limits<int64_t>::min();
  int64_t high = std::numeric_limits<int64_t>::max();
  while (low < high) {
    const int64_t middle = (low & high) + ((low ^ high) >> 1);  // floor of the mean, no overflow
    if (static_cast<float>(middle) >= bound) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

/// Integers `first <= x <= last` in an integer dtype of `size` bytes; `minimum` is its least value.
KeyTest integers_between(int64_t first, int64_t last, int64_t minimum, int64_t maximum) {
  first = std::max(first, minimum);
  last = std::min(last, maximum);
  if (first > last) {
    return never();
  }
  return bits_between(static_cast<uint64_t>(first), static_cast<uint64_t>(last));
}

template <typename T>
KeyTest integer_is_equal(const c10::Scalar& value) {
  if (value.isIntegral(/*includeBool=*/true)) {
    const auto cast =
        static_cast<uint64_t>(static_cast<T>(value.toLong()));  // wraps, as torch does
    return bits_between(cast, cast);
  }
  // torch compares an integer tensor with a float in float32, whatever the integer's width.
  const auto number = static_cast<float>(value.toDouble());
  if (!(std::abs(number) <= 9223372036854775808.0F)) {  // NaN, infinite or beyond any integer
    return never();
  }
  const int64_t first = first_rounding_to(number);
  const int64_t next =
      first_rounding_to(std::nextafter(number, std::numeric_limits<float>::infinity()));
  if (static_cast<float>(first) != number) {
    return never();
  }
  const bool to_the_end = static_cast<float>(std::numeric_limits<int64_t>::max()) == number;
  return integers_between(first, to_the_end ? std::numeric_limits<int64_t>::max() : next - 1,
                          std::numeric_limits<T>::min(), std::numeric_limits<T>::max());
}

}  // namespace

bool is_additive_dtype(at::ScalarType dtype) {
  return dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat ||
         dtype == at::kDouble;
}

bool is_mask_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBool:
    case at::kByte:
    case at::kChar:
    case at::kShort:
    case at::kInt:
    case at::kLong:
    case at::kUInt16:
    case at::kUInt32:
    case at::kUInt64:
    case at::kFloat8_e4m3fn:
    case at::kFloat8_e4m3fnuz:
    case at::kFloat8_e5m2:
    case at::kFloat8_e5m2fnuz:
    case at::kFloat8_e8m0fnu:
      return true;
    default:
      return is_additive_dtype(dtype);
  }
}

DenseFormat additive_format(at::ScalarType dtype) { return additive_format(dtype, lowest(dtype)); }

DenseFormat additive_format(at::ScalarType dtype, double masked) {
  return {static_cast<int32_t>(c10::elementSize(dtype)), /*attend=*/0, bits_in(dtype, masked)};
}

double lowest(at::ScalarType dtype) {
  return visit(dtype,
               [](auto of) -> double { return std::numeric_limits<decltype(of)>::lowest(); });
}

KeyTest is_one(at::ScalarType dtype, at::ScalarType cast_to) {
  switch (dtype) {
    case at::kBool:
      return bits_between(1, 0xFF);  // torch reads any nonzero byte as true
    case at::kFloat8_e4m3fn:
      return bits_between(0x38, 0x38);
    case at::kFloat8_e4m3fnuz:
    case at::kFloat8_e5m2fnuz:
      return bits_between(0x40, 0x40);
    case at::kFloat8_e5m2:
      return bits_between(0x3C, 0x3C);
    case at::kFloat8_e8m0fnu:
      return bits_between(0x7F, 0x7F);
    case at::kHalf:
    case at::kBFloat16:
    case at::kFloat:
    case at::kDouble: {
      const uint64_t one = bits_in(dtype, 1.0);
      const int32_t dropped = mantissa_bits(dtype) - mantissa_bits(cast_to);
      if (dropped <= 0) {
        return bits_between(one, one);
      }
      // Round to nearest even: numbers up to half a step of the result away become 1, ties included
      // (1's last bit is 0). A step below 1 is half of one above, in both dtypes, so that the range
      // is symmetric in bits. torch casts float64 to 16 bits by way of float32, which rounds first.
      uint64_t radius = uint64_t{1} << (dropped - 1);
      if (dtype == at::kDouble && cast_to != at::kFloat) {
        radius += uint64_t{1} << (mantissa_bits(at::kDouble) - mantissa_bits(at::kFloat) - 1);
      }
      return bits_between(one - radius, one + radius);
    }
    default:
      return bits_between(1, 1);
  }
}

KeyTest is_nonzero(at::ScalarType dtype) {
  if (dtype == at::kFloat8_e8m0fnu) {
    return {0, 0, 0};  // it has no zero
  }
  // Bits other than the sign; formats without a negative zero use its bits for NaN, which is true.
  const bool signed_zero =
      is_additive_dtype(dtype) || dtype == at::kFloat8_e4m3fn || dtype == at::kFloat8_e5m2;
  const uint64_t sign =
      signed_zero ? uint64_t{1} << (8 * c10::elementSize(dtype) - 1) : uint64_t{0};
  return {~sign, 1, ~uint64_t{0} - 1};
}

KeyTest is_equal(at::ScalarType dtype, const c10::Scalar& value) {
  switch (dtype) {
    case at::kByte:
      return integer_is_equal<uint8_t>(value);
    case at::kChar:
      return integer_is_equal<int8_t>(value);
    case at::kShort:
      return integer_is_equal<int16_t>(value);
    case at::kInt:
      return integer_is_equal<int32_t>(value);
    case at::kLong:
      return integer_is_equal<int64_t>(value);
    default: {
      const double number = value.toDouble();
      if (std::isnan(number)) {
        return never();
      }
      const uint64_t bits = bits_in(dtype, number);
      if ((bits & ~sign_bit(dtype)) == 0) {  // 0 == -0
        return {~sign_bit(dtype), 0, 0};
      }
      return bits_between(bits, bits);
    }
  }
}

Integers integers_of(const at::Tensor& tensor) {
  const bool is_unsigned = tensor.scalar_type() == at::kByte;
  return {tensor.const_data_ptr(),
          is_unsigned ? Integers::kUnsignedByte : static_cast<int32_t>(tensor.element_size())};
}

uint64_t sign_bit(at::ScalarType dtype) {
  return is_additive_dtype(dtype) ? uint64_t{1} << (8 * c10::elementSize(dtype) - 1) : 0;
}

}  // namespace attn_mask
