#pragma once

// What the tests of the C++ API compare masks with: tensors written one element at a time.

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <string>

namespace attn_mask::test {

inline double lowest(at::ScalarType dtype) {
  return dtype == at::kHalf       ? static_cast<double>(std::numeric_limits<at::Half>::lowest())
         : dtype == at::kBFloat16 ? static_cast<double>(std::numeric_limits<at::BFloat16>::lowest())
         : dtype == at::kFloat    ? static_cast<double>(std::numeric_limits<float>::lowest())
                                  : std::numeric_limits<double>::lowest();
}

/// A boolean mask [b, h, q, kv]: where attends(batch, head, row, column).
template <typename Attends>
at::Tensor boolean_mask(int64_t batch_size, int64_t heads, int64_t q_length, int64_t kv_length,
                        Attends attends) {
  at::Tensor mask = at::empty({batch_size, heads, q_length, kv_length}, at::kBool);
  bool* element = mask.data_ptr<bool>();
  for (int64_t batch = 0; batch < batch_size; ++batch) {
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t row = 0; row < q_length; ++row) {
        for (int64_t column = 0; column < kv_length; ++column) {
          *element++ = attends(batch, head, row, column);
        }
      }
    }
  }
  return mask;
}

/// The same as an additive mask.
inline at::Tensor additive_mask(const at::Tensor& attends, at::ScalarType dtype) {
  const at::Tensor zeros = at::zeros(attends.sizes(), dtype);
  return zeros.masked_fill(attends.logical_not(), lowest(dtype));
}

/// Sizes, dtype and every bit, with the first element that differs.
inline testing::AssertionResult same(const at::Tensor& got, const at::Tensor& want) {
  if (got.sizes() != want.sizes() || got.scalar_type() != want.scalar_type()) {
    return testing::AssertionFailure() << "got " << got.sizes() << " of " << got.scalar_type()
                                       << ", want " << want.sizes() << " of " << want.scalar_type();
  }
  const at::Tensor a = got.contiguous();
  const at::Tensor b = want.contiguous();
  const auto size = static_cast<size_t>(a.element_size());
  const auto* a_bytes = static_cast<const char*>(a.const_data_ptr());
  const auto* b_bytes = static_cast<const char*>(b.const_data_ptr());
  for (int64_t i = 0; i < a.numel(); ++i) {
    const size_t at = static_cast<size_t>(i) * size;
    if (std::memcmp(a_bytes + at, b_bytes + at, size) != 0) {
      return testing::AssertionFailure()
             << "element " << i << " of " << got.sizes() << ": got " << a.flatten()[i].item()
             << ", want " << b.flatten()[i].item();
    }
  }
  return testing::AssertionSuccess();
}

/// The text of the Error that a call throws; any other exception fails the test.
template <typename Error, typename Call>
std::string text_of(Call call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what_without_backtrace();
  }
  return "(nothing was thrown)";
}

}  // namespace attn_mask::test
