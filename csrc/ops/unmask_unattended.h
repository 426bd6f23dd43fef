#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Scalar.h>

#include "ops/core/output.h"

namespace attn_mask::ops {

/// A copy of an additive mask with its rows of `min_dtype` throughout unmasked.
at::Tensor unmask(const Output& output, const at::Tensor& expanded_mask,
                  const c10::Scalar& min_dtype);

}  // namespace attn_mask::ops
