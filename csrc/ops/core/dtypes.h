#pragma once

// What the kernels' bits mean: the only place that maps torch's dtypes to formats and key tests.

#include <ATen/core/Tensor.h>
#include <c10/core/Scalar.h>
#include <c10/core/ScalarType.h>

#include "format/dense.h"
#include "rule/math/integers.h"
#include "rule/math/key_test.h"

namespace attn_mask {

/// float16, bfloat16, float32, float64.
bool is_additive_dtype(at::ScalarType dtype);

/// Boolean, integer or real floating, float8 included.
bool is_mask_dtype(at::ScalarType dtype);

/// 0 attends, the lowest finite number of `dtype` masks.
DenseFormat additive_format(at::ScalarType dtype);

/// 0 attends, `masked` (which must be finite in `dtype`) masks.
DenseFormat additive_format(at::ScalarType dtype, double masked);

/// The lowest finite number of a floating dtype.
double lowest(at::ScalarType dtype);

/// Whether an element of `dtype` equals 1 once it is cast to `cast_to`, rounding as torch's cast
/// does.
KeyTest is_one(at::ScalarType dtype, at::ScalarType cast_to);

/// Whether an element of `dtype` is true: not zero.
KeyTest is_nonzero(at::ScalarType dtype);

/// Whether an element of `dtype` equals `value`, compared as torch's `tensor == value` does.
KeyTest is_equal(at::ScalarType dtype, const c10::Scalar& value);

/// The memory of a tensor that passed check_integer.
Integers integers_of(const at::Tensor& tensor);

/// The sign bit of a floating dtype, 0 for integers.
uint64_t sign_bit(at::ScalarType dtype);

}  // namespace attn_mask
