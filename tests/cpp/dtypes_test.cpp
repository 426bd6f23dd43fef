#include "ops/core/dtypes.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Float8_e4m3fn.h>
#include <c10/util/Float8_e4m3fnuz.h>
#include <c10/util/Float8_e5m2.h>
#include <c10/util/Float8_e5m2fnuz.h>
#include <c10/util/Float8_e8m0fnu.h>
#include <c10/util/Half.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

namespace attn_mask {
namespace {

constexpr at::ScalarType kAdditive[] = {at::kHalf, at::kBFloat16, at::kFloat, at::kDouble};

/// Whether torch's cast of `value` to `dtype` is 1.
template <typename T>
bool casts_to_one(T value, at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return static_cast<float>(static_cast<c10::Half>(value)) == 1.0F;
    case at::kBFloat16:
      return static_cast<float>(static_cast<c10::BFloat16>(value)) == 1.0F;
    case at::kFloat:
      return static_cast<float>(value) == 1.0F;
    default:
      return static_cast<double>(value) == 1.0;
  }
}

template <typename T, typename Bits>
void expect_agreement(at::ScalarType dtype, Bits bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(value));
  for (const at::ScalarType cast_to : kAdditive) {
    ASSERT_EQ(is_one(dtype, cast_to)(bits), casts_to_one(value, cast_to))
        << dtype << " with bits " << static_cast<uint64_t>(bits) << " cast to " << cast_to;
  }
}

template <typename T, typename Bits>
void expect_agreement_everywhere(at::ScalarType dtype) {
  for (uint32_t bits = 0; bits <= std::numeric_limits<Bits>::max(); ++bits) {
    expect_agreement<T>(dtype, static_cast<Bits>(bits));
  }
}

TEST(IsOne, AgreesWithTorchsCastForAllBitsOfSmallDtypes) {
  expect_agreement_everywhere<c10::Half, uint16_t>(at::kHalf);
  expect_agreement_everywhere<c10::BFloat16, uint16_t>(at::kBFloat16);
  expect_agreement_everywhere<int8_t, uint8_t>(at::kChar);
  expect_agreement_everywhere<uint8_t, uint8_t>(at::kByte);
  expect_agreement_everywhere<int16_t, uint16_t>(at::kShort);
}

template <typename T>
void expect_agreement_float8(at::ScalarType dtype) {
  for (unsigned bits = 0; bits < 256; ++bits) {
    const T value(static_cast<uint8_t>(bits), T::from_bits());
    EXPECT_EQ(is_one(dtype, at::kFloat)(static_cast<uint8_t>(bits)),
              static_cast<float>(value) == 1.0F)
        << dtype << " " << bits;
  }
}

TEST(IsOne, AgreesWithTorchsCastForFloat8) {
  expect_agreement_float8<c10::Float8_e4m3fn>(at::kFloat8_e4m3fn);
  expect_agreement_float8<c10::Float8_e4m3fnuz>(at::kFloat8_e4m3fnuz);
  expect_agreement_float8<c10::Float8_e5m2>(at::kFloat8_e5m2);
  expect_agreement_float8<c10::Float8_e5m2fnuz>(at::kFloat8_e5m2fnuz);
  expect_agreement_float8<c10::Float8_e8m0fnu>(at::kFloat8_e8m0fnu);
}

/// Walks outwards from 1 in ever larger steps, with the neighbours of each stop.
template <typename T, typename Bits>
void expect_agreement_around_one(at::ScalarType dtype) {
  const Bits one = std::bit_cast<Bits>(T{1});
  for (int shift = 0; shift < std::numeric_limits<Bits>::digits - 2; ++shift) {
    for (const Bits base :
         {Bits{1} << shift, Bits{3} << shift, (Bits{1} << shift) + (one & 0xFF)}) {
      for (int nudge = -3; nudge <= 3; ++nudge) {
        const Bits distance = base + static_cast<Bits>(nudge);
        expect_agreement<T>(dtype, static_cast<Bits>(one + distance));
        expect_agreement<T>(dtype, static_cast<Bits>(one - distance));
      }
    }
  }
  // Where float64 is rounded twice on its way to 16 bits.
  for (int half_step : {12, 9}) {
    for (int64_t nudge = -2; nudge <= 2; ++nudge) {
      const auto wide = static_cast<Bits>(Bits{1} << (std::numeric_limits<T>::digits - half_step));
      for (const Bits extra :
           {Bits{0}, static_cast<Bits>(Bits{1} << (sizeof(Bits) == 8 ? 28 : 4))}) {
        const auto distance = static_cast<Bits>(wide + extra + static_cast<Bits>(nudge));
        expect_agreement<T>(dtype, static_cast<Bits>(one + distance));
        expect_agreement<T>(dtype, static_cast<Bits>(one - distance));
      }
    }
  }
  for (const T value :
       {T{0}, -T{0}, -T{1}, T{2}, std::numeric_limits<T>::infinity(),
        std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::denorm_min()}) {
    expect_agreement<T>(dtype, std::bit_cast<Bits>(value));
  }
}

TEST(IsOne, AgreesWithTorchsCastAroundOne) {
  expect_agreement_around_one<float, uint32_t>(at::kFloat);
  expect_agreement_around_one<double, uint64_t>(at::kDouble);
}

TEST(IsOne, AnyNonzeroByteOfABoolIsTrue) {
  for (unsigned byte = 0; byte < 256; ++byte) {
    EXPECT_EQ(is_one(at::kBool, at::kFloat)(static_cast<uint8_t>(byte)), byte != 0);
  }
}

TEST(IsEqual, FloatsCompareAsNumbers) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const float value : {0.0F, -0.0F, 1.0F, -1.5F, std::numeric_limits<float>::lowest(),
                            -std::numeric_limits<float>::infinity()}) {
    const auto bits = std::bit_cast<uint32_t>(value);
    for (const double other : {0.0, -0.0, 1.0, -1.5, nan, -std::numeric_limits<double>::infinity(),
                               static_cast<double>(std::numeric_limits<float>::lowest())}) {
      EXPECT_EQ(is_equal(at::kFloat, other)(bits), value == static_cast<float>(other))
          << value << " " << other;
    }
  }
}

TEST(IsEqual, IntegersCompareWithFloatsInFloat32) {
  for (const double other : {-2147483648.0, 0.0, 16777216.0, 2147483648.0, 0.5, -3.4e38}) {
    const KeyTest test = is_equal(at::kInt, other);
    for (const int64_t near : {int64_t{-2147483648}, int64_t{-2147483520}, int64_t{-1}, int64_t{0},
                               int64_t{1}, int64_t{16777216}, int64_t{2147483583}}) {
      for (int64_t value = near - 70; value <= near + 70; ++value) {
        if (value < std::numeric_limits<int32_t>::min() ||
            value > std::numeric_limits<int32_t>::max()) {
          continue;
        }
        EXPECT_EQ(test(static_cast<uint32_t>(value)),
                  static_cast<float>(static_cast<int32_t>(value)) == static_cast<float>(other))
            << value << " " << other;
      }
    }
  }
}

TEST(IsEqual, IntegersWrapAroundAsTorchCastsThem) {
  for (const int64_t other : {int64_t{300}, int64_t{-1}, int64_t{44}}) {
    for (int value = -128; value < 128; ++value) {
      EXPECT_EQ(is_equal(at::kChar, other)(static_cast<uint8_t>(value)),
                static_cast<int8_t>(value) == static_cast<int8_t>(other));
    }
  }
}

}  // namespace
}  // namespace attn_mask
