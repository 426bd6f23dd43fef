#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <gtest/gtest.h>

#include <bit>
#include <limits>

#include "format/additive.h"
#include "format/boolean.h"

namespace attn_mask {
namespace {

template <typename T, typename Bits>
void expect_additive(const DenseFormat& format) {
  EXPECT_EQ(format.element_size, static_cast<int32_t>(sizeof(T)));
  EXPECT_EQ(format.attend, 0U);  // +0, not -0
  EXPECT_EQ(format.masked, std::bit_cast<Bits>(std::numeric_limits<T>::lowest()));
}

TEST(Additive, MasksWithTheLowestFiniteNumber) {
  expect_additive<c10::Half, uint16_t>(kAdditiveFloat16);
  expect_additive<c10::BFloat16, uint16_t>(kAdditiveBFloat16);
  expect_additive<float, uint32_t>(kAdditiveFloat32);
  expect_additive<double, uint64_t>(kAdditiveFloat64);
}

TEST(Boolean, TrueAttends) {
  EXPECT_EQ(kBoolean.element_size, static_cast<int32_t>(sizeof(bool)));
  EXPECT_EQ(kBoolean.attend, std::bit_cast<uint8_t>(true));
  EXPECT_EQ(kBoolean.masked, std::bit_cast<uint8_t>(false));
}

}  // namespace
}  // namespace attn_mask
