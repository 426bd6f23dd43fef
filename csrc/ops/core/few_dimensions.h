#pragma once

#include <ATen/core/Tensor.h>

#include "format/strided_rows.h"

namespace attn_mask {

/// `tensor` with its leading dimensions merged where strides allow, for use with strided_rows: at
/// most four dimensions of it remain. A copy only when more than three can't be merged.
at::Tensor with_few_dimensions(const at::Tensor& tensor);

/// Reads a tensor of at most four dimensions as rows.
StridedRows strided_rows(const at::Tensor& tensor);

}  // namespace attn_mask
