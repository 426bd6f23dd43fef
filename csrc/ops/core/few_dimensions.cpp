#include "ops/core/few_dimensions.h"

namespace attn_mask {

at::Tensor with_few_dimensions(const at::Tensor& tensor) {
  if (tensor.dim() <= StridedRows::kLeading + 1) {
    return tensor;
  }
  std::vector<int64_t> sizes(tensor.sizes().end() - (StridedRows::kLeading + 1),
                             tensor.sizes().end());
  for (int64_t i = 0; i < tensor.dim() - (StridedRows::kLeading + 1); ++i) {
    sizes[0] *= tensor.size(i);
  }
  return tensor.reshape(sizes);
}

StridedRows strided_rows(const at::Tensor& tensor) {
  StridedRows rows{};
  rows.data = tensor.const_data_ptr();
  rows.element_size = static_cast<int32_t>(tensor.element_size());
  rows.length = tensor.dim() == 0 ? 1 : tensor.size(-1);
  rows.stride = tensor.dim() == 0 ? 1 : tensor.stride(-1);
  const int64_t leading = std::max<int64_t>(tensor.dim() - 1, 0);
  for (int64_t i = 0; i < StridedRows::kLeading; ++i) {
    const int64_t dim = i - (StridedRows::kLeading - leading);
    rows.sizes[i] = dim < 0 ? 1 : tensor.size(dim);
    rows.strides[i] = dim < 0 ? 0 : tensor.stride(dim);
  }
  return rows;
}

}  // namespace attn_mask
