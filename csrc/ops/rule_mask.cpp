#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/where.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <utility>
#include <vector>

#include "format/boolean.h"
#include "ops/call.h"
#include "ops/checks.h"
#include "ops/dtypes.h"
#include "ops/operators.h"
#include "ops/output.h"
#include "ops/rule_question.h"
#include "ops/write_mask.h"

namespace attn_mask::ops {
namespace {

struct Arguments : RuleArguments {
  const std::optional<at::Tensor>& bias;
  bool unmask_unattended;
};

at::Tensor rule_mask(const char* op, const Arguments& arguments, at::ScalarType dtype,
                     const DenseFormat& format, const Output& output) {
  const RuleProgram& program = arguments.program;
  const std::optional<at::Tensor>& bias = arguments.bias;
  const at::Device device = device_of(op, arguments, bias);
  MaskTask task{};
  Decoded decoded = decode_question(op, arguments, device, task);
  c10::SymInt heads = decoded.heads;
  if (bias) {
    TORCH_CHECK_TYPE(bias->scalar_type() == dtype, op, ": expected bias to be ", dtype,
                     ", but got ", bias->scalar_type());
    TORCH_CHECK_VALUE(bias->device() == device, op, ": expected bias to be on ", device,
                      ", but got ", bias->device());
    check_rank(op, "bias", *bias, 4, "[batch_size, heads, q_length, kv_length]");
    const c10::SymInt& bias_heads = bias->sym_size(1);
    if (heads.maybe_as_int() == 1) {
      heads = bias_heads;
    } else if (bias_heads.maybe_as_int() != 1) {
      ATTN_MASK_CHECK_SYM_VALUE(bias_heads.sym_eq(heads), op, ": expected bias to have 1 or ",
                                heads, " heads, but got ", describe_sizes(*bias));
    }
    if (bias->sym_size(0).maybe_as_int() != 1) {
      ATTN_MASK_CHECK_SYM_VALUE(bias->sym_size(0).sym_eq(program.batch_size), op,
                                ": expected bias to have a batch size of 1 or ", program.batch_size,
                                ", but got ", describe_sizes(*bias));
      decoded.depends_on_batch = true;
    }
    ATTN_MASK_CHECK_SYM_VALUE(bias->sym_size(2).sym_eq(program.q_length), op,
                              ": expected bias to have q_length ", program.q_length, ", but got ",
                              describe_sizes(*bias));
    ATTN_MASK_CHECK_SYM_VALUE(bias->sym_size(3).sym_eq(program.kv_length), op,
                              ": expected bias to have kv_length ", program.kv_length, ", but got ",
                              describe_sizes(*bias));
  }
  check_addressable(op, {program.batch_size, heads, program.q_length, program.kv_length}, dtype);
  // Where all batch rows of a new mask are alike one is written and the batch is a stride-0 expand
  // of it; but, as upstream's, additive masks can be written to.
  const bool one_for_all = dtype == at::kBool && !decoded.depends_on_batch && !output.is_given();
  const c10::SymInt rows = one_for_all ? c10::SymInt(1) : program.batch_size;
  const at::Tensor out =
      output.mask(rows, heads, program.q_length, program.kv_length, dtype, device);
  if (!device.is_meta() && out.numel() != 0) {
    set_output(task, out, format);
    if (bias) {
      task.bias = {bias->const_data_ptr(),
                   {bias->size(0) == 1 ? 0 : bias->stride(0),
                    bias->size(1) == 1 ? 0 : bias->stride(1), bias->stride(2), bias->stride(3)}};
      // What kernels replace by the bias: a NaN, as a masked element may hold any number.
      task.format.attend = ~uint64_t{0};
    }
    const auto unmasked =
        arguments.unmask_unattended ? std::optional(task.format.attend) : std::nullopt;
    if (decoded.has_parts) {
      ask_in_parts(op, program, task, device, height_of_parts(task),
                   [&](int64_t first, const Question& rows) {
                     MaskTask part = task.part(first, first + rows.q_length);
                     part.rule = rows.rule;
                     prepare_and_run(part, device, unmasked);
                   });
    } else {
      prepare_and_run(task, device, unmasked);
    }
  }
  return one_for_all ? with_batch_of(out, program.batch_size) : out;
}

constexpr auto kBooleanOp = "boolean";
constexpr auto kAdditiveOp = "additive";

/// All the tensors among the inputs, which `out` must not share memory with.
std::vector<at::Tensor> inputs_of(const Arguments& arguments) {
  std::vector<at::Tensor> inputs(arguments.program.operands.begin(),
                                 arguments.program.operands.end());
  for (const auto* tensor : {&arguments.q_positions, &arguments.kv_positions, &arguments.bias}) {
    if (*tensor) {
      inputs.push_back(**tensor);
    }
  }
  return inputs;
}

/// What masked elements hold: as asked, or the lowest finite number.
DenseFormat format_of(at::ScalarType dtype, const std::optional<c10::Scalar>& masked_value) {
  if (!masked_value) {
    return additive_format(dtype);
  }
  TORCH_CHECK_TYPE(!masked_value->isComplex() && !masked_value->isBoolean(), kAdditiveOp,
                   ": expected masked_value to be a real number, but got ", *masked_value);
  const double masked = masked_value->toDouble();
  TORCH_CHECK_VALUE(masked <= 0, kAdditiveOp, ": expected masked_value to be at most 0, but got ",
                    masked);
  const DenseFormat format = additive_format(dtype, masked);
  // Overflow would make a finite number -inf, underflow would show what is to be masked.
  const bool is_held = (masked == 0 || format.masked != sign_bit(dtype)) &&
                       (std::isinf(masked) || format.masked <= additive_format(dtype).masked);
  TORCH_CHECK_VALUE(is_held, kAdditiveOp, ": expected masked_value to be a number that ", dtype,
                    " holds, but got ", masked);
  return format;
}

at::Tensor additive(const Arguments& arguments, at::ScalarType dtype,
                    const std::optional<c10::Scalar>& masked_value, const Output& output) {
  check_additive_dtype(kAdditiveOp, "dtype", dtype);
  return rule_mask(kAdditiveOp, arguments, dtype, format_of(dtype, masked_value), output);
}

const std::optional<at::Tensor> kNoBias;

}  // namespace

at::Tensor boolean(c10::SymIntArrayRef rule, at::TensorList operands, c10::SymInt batch_size,
                   c10::SymInt q_length, c10::SymInt kv_length, c10::SymInt q_offset,
                   c10::SymInt kv_offset, const std::optional<at::Tensor>& q_positions,
                   const std::optional<at::Tensor>& kv_positions, std::optional<at::Device> device,
                   bool unmask_unattended, c10::SymInt stride_multiple) {
  return rule_mask(kBooleanOp,
                   {{{rule, operands, batch_size, q_length, kv_length},
                     q_offset,
                     kv_offset,
                     q_positions,
                     kv_positions,
                     device},
                    kNoBias,
                    unmask_unattended},
                   at::kBool, kBoolean, Output(kBooleanOp, std::move(stride_multiple)));
}

void boolean_out(c10::SymIntArrayRef rule, at::TensorList operands, c10::SymInt batch_size,
                 c10::SymInt q_length, c10::SymInt kv_length, c10::SymInt q_offset,
                 c10::SymInt kv_offset, const std::optional<at::Tensor>& q_positions,
                 const std::optional<at::Tensor>& kv_positions, std::optional<at::Device> device,
                 bool unmask_unattended, const at::Tensor& out) {
  Arguments arguments{{{rule, operands, batch_size, q_length, kv_length},
                       q_offset,
                       kv_offset,
                       q_positions,
                       kv_positions,
                       device},
                      kNoBias,
                      unmask_unattended};
  const Output output(kBooleanOp, out, inputs_of(arguments));
  arguments.device = output.device(device);
  rule_mask(kBooleanOp, arguments, at::kBool, kBoolean, output);
}

at::Tensor additive(c10::SymIntArrayRef rule, at::TensorList operands, c10::SymInt batch_size,
                    c10::SymInt q_length, c10::SymInt kv_length, at::ScalarType dtype,
                    c10::SymInt q_offset, c10::SymInt kv_offset,
                    const std::optional<at::Tensor>& q_positions,
                    const std::optional<at::Tensor>& kv_positions,
                    const std::optional<at::Tensor>& bias, std::optional<at::Device> device,
                    bool unmask_unattended, const std::optional<c10::Scalar>& masked_value,
                    c10::SymInt stride_multiple) {
  return additive({{{rule, operands, batch_size, q_length, kv_length},
                    q_offset,
                    kv_offset,
                    q_positions,
                    kv_positions,
                    device},
                   bias,
                   unmask_unattended},
                  dtype, masked_value, Output(kAdditiveOp, std::move(stride_multiple)));
}

void additive_out(c10::SymIntArrayRef rule, at::TensorList operands, c10::SymInt batch_size,
                  c10::SymInt q_length, c10::SymInt kv_length, std::optional<at::ScalarType> dtype,
                  c10::SymInt q_offset, c10::SymInt kv_offset,
                  const std::optional<at::Tensor>& q_positions,
                  const std::optional<at::Tensor>& kv_positions,
                  const std::optional<at::Tensor>& bias, std::optional<at::Device> device,
                  bool unmask_unattended, const std::optional<c10::Scalar>& masked_value,
                  const at::Tensor& out) {
  if (bias) {
    check_no_gradient(kAdditiveOp, "bias", *bias);
  }
  Arguments arguments{{{rule, operands, batch_size, q_length, kv_length},
                       q_offset,
                       kv_offset,
                       q_positions,
                       kv_positions,
                       device},
                      bias,
                      unmask_unattended};
  const Output output(kAdditiveOp, out, inputs_of(arguments));
  arguments.device = output.device(device);
  additive(arguments, output.dtype(dtype), masked_value, output);
}

at::Tensor additive_autograd(
    c10::SymIntArrayRef rule, at::TensorList operands, c10::SymInt batch_size, c10::SymInt q_length,
    c10::SymInt kv_length, at::ScalarType dtype, c10::SymInt q_offset, c10::SymInt kv_offset,
    const std::optional<at::Tensor>& q_positions, const std::optional<at::Tensor>& kv_positions,
    const std::optional<at::Tensor>& bias, std::optional<at::Device> device, bool unmask_unattended,
    const std::optional<c10::Scalar>& masked_value, c10::SymInt stride_multiple) {
  for (const at::Tensor& operand : operands) {
    check_strided(kAdditiveOp, "operands", operand);
  }
  if (q_positions) {
    check_strided(kAdditiveOp, "q_positions", *q_positions);
  }
  if (kv_positions) {
    check_strided(kAdditiveOp, "kv_positions", *kv_positions);
  }
  if (bias) {
    check_strided(kAdditiveOp, "bias", *bias);
  }
  const bool differentiable = c10::GradMode::is_enabled() && bias && bias->requires_grad();
  at::Tensor mask;
  {
    const at::AutoDispatchBelowAutograd below;
    mask = call::additive(rule, operands, batch_size, q_length, kv_length, dtype, q_offset,
                          kv_offset, q_positions, kv_positions, bias, device, unmask_unattended,
                          masked_value, stride_multiple);
    if (!differentiable) {
      return mask;
    }
  }
  // A bias that is being learned: attended elements pass their gradient on.
  at::Tensor attended;
  {
    const at::AutoDispatchBelowAutograd below;
    attended = call::boolean(rule, operands, std::move(batch_size), std::move(q_length),
                             std::move(kv_length), std::move(q_offset), std::move(kv_offset),
                             q_positions, kv_positions, device, unmask_unattended,
                             /*stride_multiple=*/1);
  }
  return with_stride_multiple(at::where(attended, *bias, mask), stride_multiple);
}

}  // namespace attn_mask::ops
