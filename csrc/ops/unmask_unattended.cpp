#include "ops/unmask_unattended.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/where.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/GradMode.h>

#include "ops/core/call.h"
#include "ops/core/checks.h"
#include "ops/core/device_kernels.h"
#include "ops/core/dtypes.h"
#include "ops/core/few_dimensions.h"
#include "ops/core/operators.h"
#include "ops/core/output.h"

namespace attn_mask::ops {

namespace {

/// Kernels have four dimensions; this loops over the outermost of more.
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

at::Tensor unmask(const Output& output, const at::Tensor& expanded_mask,
                  const c10::Scalar& min_dtype) {
  const char* const op = output.op();
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

at::Tensor UnmaskUnattended::run(const Output& output, const Given& given) {
  output.check_no_gradient("expanded_mask", given.get<"expanded_mask">());
  return unmask(output, given.get<"expanded_mask">(), given.get<"min_dtype">());
}

at::Tensor UnmaskUnattended::autograd(const Given& given) {
  const at::Tensor& expanded_mask = given.get<"expanded_mask">();
  check_strided(kName, "expanded_mask", expanded_mask);
  const bool differentiable = c10::GradMode::is_enabled() && expanded_mask.requires_grad();
  at::Tensor unmasked;
  {
    const at::AutoDispatchBelowAutograd below;
    unmasked = call_with<UnmaskUnattended>(given);
  }
  if (!differentiable) {
    return unmasked;
  }
  // A bias that is being learned: rows that stay pass their gradient on, unmasked ones have none.
  const at::Tensor fully_masked =
      expanded_mask.detach().eq(given.get<"min_dtype">()).all(-1, /*keepdim=*/true);
  return with_stride_multiple(at::where(fully_masked, unmasked, expanded_mask),
                              given.get<"stride_multiple">());
}

}  // namespace attn_mask::ops
