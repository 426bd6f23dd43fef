#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/where.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/GradMode.h>

#include "cpu/huge_pages.h"
#include "ops/call.h"
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

at::Tensor unmask_unattended_autograd(const at::Tensor& expanded_mask,
                                      const c10::Scalar& min_dtype) {
  const bool differentiable = c10::GradMode::is_enabled() && expanded_mask.requires_grad();
  at::Tensor opened;
  {
    const at::AutoDispatchBelowAutograd below;
    opened = call::unmask_unattended(expanded_mask, min_dtype);
  }
  if (!differentiable) {
    return opened;
  }
  // A bias that is being learned: rows that stay pass their gradient on, opened ones have none.
  const at::Tensor closed = expanded_mask.detach().eq(min_dtype).all(-1, /*keepdim=*/true);
  return at::where(closed, opened, expanded_mask);
}

}  // namespace attn_mask::ops
