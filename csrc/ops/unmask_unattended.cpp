#include "ops/unmask_unattended.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/where.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/GradMode.h>

#include "ops/call.h"
#include "ops/checks.h"
#include "ops/dtypes.h"
#include "ops/kernels.h"
#include "ops/operators.h"
#include "ops/output.h"
#include "ops/strided_rows.h"

namespace attn_mask::ops {

namespace {

constexpr auto kOp = "_unmask_unattended";

/// Kernels know four dimensions; the outermost of more are gone through here.
void run_unmask(const at::Tensor& in, const at::Tensor& out, const UnmaskParams& settings) {
  if (in.dim() > StridedRows::kLeading + 1) {
    for (int64_t i = 0; i < in.size(0); ++i) {
      run_unmask(in.select(0, i), out.select(0, i), settings);
    }
    return;
  }
  UnmaskParams params = settings;
  params.in = strided_rows(in);
  params.out = strided_rows(out);
  params.written = out.data_ptr();
  device_kernels(out.device().type()).unmask(params);
}

}  // namespace

at::Tensor unmask(const char* op, const at::Tensor& expanded_mask, const c10::Scalar& min_dtype,
                  const Output& output) {
  const at::ScalarType dtype = expanded_mask.scalar_type();
  TORCH_CHECK_VALUE(
      dtype != at::kBool,
      "AttentionMaskConverter._unmask_unattended expects a float `expanded_mask`, got "
      "a BoolTensor.");
  TORCH_CHECK_TYPE(
      is_additive_dtype(dtype) || c10::isIntegralType(dtype, /*includeBool=*/false), op,
      ": expected expanded_mask to be of a real floating or integer dtype, but got ", dtype);
  TORCH_CHECK_TYPE(dtype != at::kUInt16 && dtype != at::kUInt32 && dtype != at::kUInt64, op,
                   ": expected expanded_mask to be of a real floating or integer dtype that torch "
                   "multiplies, but got ",
                   dtype);
  TORCH_CHECK_TYPE(!min_dtype.isComplex(), op, ": expected min_dtype to be a real number, but got ",
                   min_dtype);
  // Not the scalar itself, which would be printed as 64 bits with a sign.
  TORCH_CHECK_VALUE(is_additive_dtype(dtype) || min_dtype.type() != at::kUInt64, op,
                    ": expected min_dtype to fit into 64 bits with a sign, but got ",
                    min_dtype.toUInt64());
  const at::Tensor out = output.like(expanded_mask);
  if (out.is_meta() || out.numel() == 0) {
    return out;
  }
  UnmaskParams settings{};
  settings.is_min = is_equal(dtype, min_dtype);
  settings.sign = sign_bit(dtype);
  const c10::OptionalDeviceGuard guard(out.device());
  run_unmask(expanded_mask, out, settings);
  return out;
}

at::Tensor unmask_unattended(const at::Tensor& expanded_mask, const c10::Scalar& min_dtype,
                             c10::SymInt stride_multiple) {
  return unmask(kOp, expanded_mask, min_dtype, Output(kOp, std::move(stride_multiple)));
}

void unmask_unattended_out(const at::Tensor& expanded_mask, const c10::Scalar& min_dtype,
                           const at::Tensor& out) {
  check_no_gradient(kOp, "expanded_mask", expanded_mask);
  // A row is read before it is written, so that the mask may be unmasked where it lies.
  const bool in_place = !out.is_meta() && out.scalar_type() == expanded_mask.scalar_type() &&
                        out.sizes() == expanded_mask.sizes() &&
                        out.strides() == expanded_mask.strides() &&
                        out.const_data_ptr() == expanded_mask.const_data_ptr();
  unmask(kOp, expanded_mask, min_dtype,
         Output(kOp, out, in_place ? at::TensorList() : at::TensorList(expanded_mask)));
}

at::Tensor unmask_unattended_autograd(const at::Tensor& expanded_mask, const c10::Scalar& min_dtype,
                                      c10::SymInt stride_multiple) {
  check_strided(kOp, "expanded_mask", expanded_mask);
  const bool differentiable = c10::GradMode::is_enabled() && expanded_mask.requires_grad();
  at::Tensor unmasked;
  {
    const at::AutoDispatchBelowAutograd below;
    unmasked = call::unmask_unattended(expanded_mask, min_dtype, stride_multiple);
  }
  if (!differentiable) {
    return unmasked;
  }
  // A bias that is being learned: rows that stay pass their gradient on, unmasked ones have none.
  const at::Tensor closed = expanded_mask.detach().eq(min_dtype).all(-1, /*keepdim=*/true);
  return with_stride_multiple(at::where(closed, unmasked, expanded_mask), stride_multiple);
}

}  // namespace attn_mask::ops
