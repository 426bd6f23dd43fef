#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/where.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <tuple>
#include <utility>

#include "format/boolean.h"
#include "ops/core/call.h"
#include "ops/core/checks.h"
#include "ops/core/dtypes.h"
#include "ops/core/operators.h"
#include "ops/core/output.h"
#include "ops/core/rule_problem.h"
#include "ops/core/write_mask.h"

namespace attn_mask::ops {
namespace {

/// The bias must fit a mask of `heads` heads. Gives the heads of both, and whether batch rows of it
/// differ.
std::pair<c10::SymInt, bool> check_bias(const char* op, const at::Tensor& bias,
                                        const RuleProgram& program, const c10::SymInt& heads,
                                        at::ScalarType dtype, at::Device device) {
  TORCH_CHECK_TYPE(bias.scalar_type() == dtype, op, ": expected bias to be ", dtype, ", but got ",
                   bias.scalar_type());
  TORCH_CHECK_VALUE(bias.device() == device, op, ": expected bias to be on ", device, ", but got ",
                    bias.device());
  check_rank(op, "bias", bias, 4, "[batch_size, heads, q_length, kv_length]");
  const c10::SymInt& bias_heads = bias.sym_size(1);
  if (heads.maybe_as_int() != 1 && bias_heads.maybe_as_int() != 1) {
    ATTN_MASK_CHECK_SYM_VALUE(bias_heads.sym_eq(heads), op, ": expected bias to have 1 or ", heads,
                              " heads, but got ", describe_sizes(bias));
  }
  const bool differs = bias.sym_size(0).maybe_as_int() != 1;
  if (differs) {
    ATTN_MASK_CHECK_SYM_VALUE(bias.sym_size(0).sym_eq(program.batch_size), op,
                              ": expected bias to have a batch size of 1 or ", program.batch_size,
                              ", but got ", describe_sizes(bias));
  }
  ATTN_MASK_CHECK_SYM_VALUE(bias.sym_size(2).sym_eq(program.q_length), op,
                            ": expected bias to have q_length ", program.q_length, ", but got ",
                            describe_sizes(bias));
  ATTN_MASK_CHECK_SYM_VALUE(bias.sym_size(3).sym_eq(program.kv_length), op,
                            ": expected bias to have kv_length ", program.kv_length, ", but got ",
                            describe_sizes(bias));
  return {heads.maybe_as_int() == 1 ? bias_heads : heads, differs};
}

at::Tensor rule_mask(const Output& output, const RuleArguments& arguments,
                     const std::optional<at::Tensor>& bias, bool unmask_unattended,
                     at::ScalarType dtype, const DenseFormat& format) {
  const char* const op = output.op();
  const RuleProgram& program = arguments.program;
  const at::Device device = device_of(op, arguments, bias);
  MaskParams params{};
  const Decoded decoded = decode_problem(op, arguments, device, params);
  c10::SymInt heads = decoded.heads;
  bool depends_on_batch = decoded.depends_on_batch;
  if (bias) {
    bool differs = false;
    std::tie(heads, differs) = check_bias(op, *bias, program, decoded.heads, dtype, device);
    depends_on_batch |= differs;
  }
  check_addressable(op, {program.batch_size, heads, program.q_length, program.kv_length}, dtype);
  // Where all batch rows of a new mask are alike one is written and the batch is a stride-0 expand
  // of it; but, as upstream's, additive masks can be written to.
  const bool one_for_all = dtype == at::kBool && !depends_on_batch && !output.is_given();
  const c10::SymInt rows = one_for_all ? c10::SymInt(1) : program.batch_size;
  const at::Tensor out =
      output.mask(rows, heads, program.q_length, program.kv_length, dtype, device);
  if (!device.is_meta() && out.numel() != 0) {
    set_output(params, out, format);
    if (bias) {
      params.bias = {bias->const_data_ptr(),
                     {bias->size(0) == 1 ? 0 : bias->stride(0),
                      bias->size(1) == 1 ? 0 : bias->stride(1), bias->stride(2), bias->stride(3)}};
      // What kernels replace by the bias: a NaN, as a masked element may hold any number.
      params.format.attend = ~uint64_t{0};
    }
    const auto unmasked = unmask_unattended ? std::optional(params.format.attend) : std::nullopt;
    if (decoded.has_parts) {
      evaluate_in_parts(op, program, params, device, height_of_parts(params),
                        [&](int64_t first, const Problem& rows) {
                          MaskParams part = params.part(first, first + rows.q_length);
                          part.rule = rows.rule;
                          prepare_and_run(part, device, unmasked);
                        });
    } else {
      prepare_and_run(params, device, unmasked);
    }
  }
  return one_for_all ? with_batch_of(out, program.batch_size) : out;
}

/// What masked elements hold: `masked_value`, or the lowest finite number.
DenseFormat format_of(at::ScalarType dtype, const std::optional<c10::Scalar>& masked_value) {
  if (!masked_value) {
    return additive_format(dtype);
  }
  TORCH_CHECK_TYPE(!masked_value->isComplex() && !masked_value->isBoolean(), Additive::kName,
                   ": expected masked_value to be a real number, but got ", *masked_value);
  const double masked = masked_value->toDouble();
  TORCH_CHECK_VALUE(masked <= 0, Additive::kName,
                    ": expected masked_value to be at most 0, but got ", masked);
  const DenseFormat format = additive_format(dtype, masked);
  // Overflow would make a finite number -inf, underflow would show what is to be masked.
  const bool is_held = (masked == 0 || format.masked != sign_bit(dtype)) &&
                       (std::isinf(masked) || format.masked <= additive_format(dtype).masked);
  TORCH_CHECK_VALUE(is_held, Additive::kName, ": expected masked_value to be a number that ", dtype,
                    " holds, but got ", masked);
  return format;
}

}  // namespace

at::Tensor Boolean::run(const Output& output, const Given& given) {
  return rule_mask(output, RuleArguments(given), std::nullopt, given.get<"unmask_unattended">(),
                   at::kBool, kBoolean);
}

at::Tensor Additive::run(const Output& output, const Given& given) {
  const std::optional<at::Tensor>& bias = given.get<"bias">();
  const at::ScalarType dtype = given.get<"dtype">();
  if (bias) {
    output.check_no_gradient("bias", *bias);
  }
  check_additive_dtype(kName, "dtype", dtype);
  return rule_mask(output, RuleArguments(given), bias, given.get<"unmask_unattended">(), dtype,
                   format_of(dtype, given.get<"masked_value">()));
}

at::Tensor Additive::autograd(const Given& given) {
  for (const at::Tensor& operand : given.get<"operands">()) {
    check_strided(kName, "operands", operand);
  }
  const std::optional<at::Tensor>& bias = given.get<"bias">();
  for (const auto& [argument, tensor] : {std::pair("q_positions", &given.get<"q_positions">()),
                                         {"kv_positions", &given.get<"kv_positions">()},
                                         {"bias", &bias}}) {
    if (*tensor) {
      check_strided(kName, argument, **tensor);
    }
  }
  at::Tensor mask;
  at::Tensor attended;
  {
    const at::AutoDispatchBelowAutograd below;
    mask = call_with<Additive>(given);
    if (!c10::GradMode::is_enabled() || !bias || !bias->requires_grad()) {
      return mask;
    }
    attended = call_with<Boolean>(Boolean::Given::of(given));
  }
  // A bias that is being learned: attended elements pass their gradient on.
  return with_stride_multiple(at::where(attended, *bias, mask), given.get<"stride_multiple">());
}

}  // namespace attn_mask::ops
