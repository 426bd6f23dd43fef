#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>

#include "cpu/huge_pages.h"
#include "ops/checks.h"
#include "ops/dtypes.h"
#include "ops/kernels.h"
#include "ops/operators.h"
#include "ops/strided_rows.h"

namespace attn_mask::ops {

at::Tensor unmask_unattended(const at::Tensor& expanded_mask, const c10::Scalar& min_dtype) {
  static constexpr auto kOp = "_unmask_unattended";
  const at::ScalarType dtype = expanded_mask.scalar_type();
  TORCH_CHECK_VALUE(
      dtype != at::kBool,
      "AttentionMaskConverter._unmask_unattended expects a float `expanded_mask`, got "
      "a BoolTensor.");
  TORCH_CHECK_TYPE(
      is_additive_dtype(dtype) || c10::isIntegralType(dtype, /*includeBool=*/false), kOp,
      ": expected expanded_mask to be of a real floating or integer dtype, but got ", dtype);
  TORCH_CHECK_TYPE(dtype != at::kUInt16 && dtype != at::kUInt32 && dtype != at::kUInt64, kOp,
                   ": expected expanded_mask to be of a real floating or integer dtype that torch "
                   "multiplies, but got ",
                   dtype);
  TORCH_CHECK_TYPE(!min_dtype.isComplex(), kOp,
                   ": expected min_dtype to be a real number, but got ", min_dtype);
  at::Tensor out = at::empty_like(expanded_mask, at::MemoryFormat::Contiguous);
  if (out.is_meta()) {
    return out;
  }
  if (out.is_cpu()) {
    advise_huge_pages(out.data_ptr(), static_cast<int64_t>(out.nbytes()));
  }
  const at::Tensor in = with_few_dimensions(expanded_mask);
  const UnmaskTask task{strided_rows(in), is_equal(dtype, min_dtype), sign_bit(dtype),
                        out.data_ptr()};
  const c10::OptionalDeviceGuard guard(out.device());
  device_kernels(out.device().type()).unmask(task);
  return out;
}

}  // namespace attn_mask::ops
