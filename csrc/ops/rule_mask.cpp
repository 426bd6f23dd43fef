#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/where.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "format/boolean.h"
#include "ops/call.h"
#include "ops/checks.h"
#include "ops/dtypes.h"
#include "ops/operators.h"
#include "ops/output.h"
#include "ops/rule_program.h"
#include "ops/write_mask.h"
#include "rule/prepare.h"

namespace attn_mask::ops {
namespace {

/// Positions of rows or columns, and whether they differ within the batch.
Positions positions_of(const char* op, const char* argument, const char* offset_argument,
                       const c10::SymInt& offset, const std::optional<at::Tensor>& tensor,
                       const c10::SymInt& length, const c10::SymInt& batch_size, at::Device device,
                       bool with_data, bool& depends_on_batch) {
  const auto known = offset.maybe_as_int();
  TORCH_CHECK_VALUE(!known || (-kFar < *known && *known < kFar), op, ": expected ", offset_argument,
                    " to be within 2^59 of 0, but got ", offset);
  Positions positions{};
  if (with_data) {
    positions.offset = offset.expect_int();
  }
  if (!tensor) {
    return positions;
  }
  check_integer(op, argument, *tensor);
  TORCH_CHECK_VALUE(tensor->device() == device, op, ": expected ", argument, " to be on ", device,
                    ", but got ", tensor->device());
  TORCH_CHECK_VALUE(tensor->dim() <= 2, op, ": expected ", argument,
                    " to be an offset ([] or [batch_size, 1]) or positions ([length] or "
                    "[batch_size, length]), but got ",
                    describe_sizes(*tensor));
  const bool each_row = tensor->dim() == 2 && tensor->sym_size(0).maybe_as_int() != 1;
  if (each_row) {
    ATTN_MASK_CHECK_SYM_VALUE(tensor->sym_size(0).sym_eq(batch_size), op, ": expected ", argument,
                              " to have a batch size of 1 or ", batch_size, ", but got ",
                              describe_sizes(*tensor));
    depends_on_batch = true;
  }
  const bool listed =
      tensor->dim() == 1 || (tensor->dim() == 2 && tensor->sym_size(1).maybe_as_int() != 1);
  if (listed) {
    ATTN_MASK_CHECK_SYM_VALUE(tensor->sym_size(-1).sym_eq(length), op, ": expected ", argument,
                              " to list ", length, " positions, but got ", describe_sizes(*tensor));
  }
  if (with_data) {
    positions.numbers = integers_of(*tensor);
    positions.batch_stride = each_row ? tensor->stride(0) : 0;
    positions.stride = listed ? tensor->stride(-1) : 0;
    positions.listed = listed;
  }
  return positions;
}

// What a part of a rule answers beside the mask is held for so many bytes of rows at once.
constexpr int64_t kPartBytes = int64_t{2} << 20;

struct Arguments {
  RuleProgram program;
  const c10::SymInt& q_offset;
  const c10::SymInt& kv_offset;
  const std::optional<at::Tensor>& q_positions;
  const std::optional<at::Tensor>& kv_positions;
  const std::optional<at::Tensor>& bias;
  std::optional<at::Device> device;
};

/// The device of the result: as asked for, else that of the first tensor, else the CPU.
at::Device device_of(const char* op, const Arguments& arguments) {
  std::optional<at::Device> of_tensors;
  if (!arguments.program.operands.empty()) {
    of_tensors = arguments.program.operands[0].device();
  } else if (arguments.q_positions) {
    of_tensors = arguments.q_positions->device();
  } else if (arguments.kv_positions) {
    of_tensors = arguments.kv_positions->device();
  } else if (arguments.bias) {
    of_tensors = arguments.bias->device();
  }
  if (of_tensors) {
    const bool same = !arguments.device || is_asked_for(*arguments.device, *of_tensors);
    TORCH_CHECK_VALUE(same || of_tensors->is_meta(), op,
                      ": expected device to be that of the operands, which is ", *of_tensors,
                      ", but got ", *arguments.device);
    return *of_tensors;
  }
  return arguments.device.value_or(at::kCPU);
}

/// Writes the task, whose rule has yet to be prepared.
void prepare_and_run(MaskTask task, at::Device device) {
  std::optional<PreparedTables> prepared;
  if (device.is_cpu()) {
    prepared.emplace(task);
  }
  run(task, device);
}

/// Writes the mask of a rule that is too large for kernels, some rows after the other: first what
/// its parts answer about them, then the rows.
void run_in_parts(const char* op, const RuleProgram& program, const MaskTask& task,
                  at::Device device) {
  const int64_t row_bytes = task.batch_size * task.heads * task.kv_length;
  const int64_t height = std::max<int64_t>(1, kPartBytes / row_bytes);
  for (int64_t begin = 0; begin < task.q_length; begin += height) {
    MaskTask rows = task.part(begin, std::min(begin + height, task.q_length));
    std::vector<at::Tensor> answers;
    const auto bits_of_part = [&](const Rule& part) -> Padding {
      const at::Tensor bits =
          at::empty({rows.batch_size, rows.heads, rows.q_length, rows.kv_length},
                    at::TensorOptions().dtype(at::kBool).device(device));
      MaskTask of_part = mask_task(bits, kBoolean);
      of_part.rule = part;
      of_part.q_positions = rows.q_positions;
      of_part.kv_positions = rows.kv_positions;
      prepare_and_run(of_part, device);
      // What the part's own parts answered has been used.
      std::erase_if(answers, [&](const at::Tensor& answer) {
        return std::any_of(part.nodes, part.nodes + part.size, [&](const Rule::Node& node) {
          return node.kind == Rule::Kind::kPadding && node.padding.mask == answer.const_data_ptr();
        });
      });
      answers.push_back(bits);
      return bits_leaf(bits, /*first_row=*/0);
    };
    rows.rule = decode_rule(op, program, device, /*with_data=*/true, begin, bits_of_part).rule;
    prepare_and_run(rows, device);
  }
}

at::Tensor rule_mask(const char* op, const Arguments& arguments, at::ScalarType dtype,
                     const DenseFormat& format, const Output& output) {
  const RuleProgram& program = arguments.program;
  const std::optional<at::Tensor>& bias = arguments.bias;
  check_size(op, "batch_size", program.batch_size);
  check_size(op, "q_length", program.q_length);
  check_size(op, "kv_length", program.kv_length);
  const at::Device device = device_of(op, arguments);
  const bool with_data = !device.is_meta();
  DecodedRule decoded = decode_rule(op, program, device, with_data);
  const Positions q_positions = positions_of(
      op, "q_positions", "q_offset", arguments.q_offset, arguments.q_positions, program.q_length,
      program.batch_size, device, with_data, decoded.depends_on_batch);
  const Positions kv_positions = positions_of(
      op, "kv_positions", "kv_offset", arguments.kv_offset, arguments.kv_positions,
      program.kv_length, program.batch_size, device, with_data, decoded.depends_on_batch);
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
  if (with_data && out.numel() != 0) {
    MaskTask task = mask_task(out, format);
    task.rule = decoded.rule;
    task.q_positions = q_positions;
    task.kv_positions = kv_positions;
    if (bias) {
      task.bias = {bias->const_data_ptr(),
                   {bias->size(0) == 1 ? 0 : bias->stride(0),
                    bias->size(1) == 1 ? 0 : bias->stride(1), bias->stride(2), bias->stride(3)}};
    }
    if (decoded.has_parts) {
      run_in_parts(op, program, task, device);
    } else {
      prepare_and_run(task, device);
    }
  }
  if (!one_for_all) {
    return out;
  }
  return out.expand_symint({program.batch_size, heads, program.q_length, program.kv_length});
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

at::Tensor additive(const Arguments& arguments, at::ScalarType dtype, const Output& output) {
  check_additive_dtype(kAdditiveOp, "dtype", dtype);
  return rule_mask(kAdditiveOp, arguments, dtype, additive_format(dtype), output);
}

const std::optional<at::Tensor> kNoBias;

}  // namespace

at::Tensor boolean(c10::SymIntArrayRef rule, at::TensorList operands, c10::SymInt batch_size,
                   c10::SymInt q_length, c10::SymInt kv_length, c10::SymInt q_offset,
                   c10::SymInt kv_offset, const std::optional<at::Tensor>& q_positions,
                   const std::optional<at::Tensor>& kv_positions, std::optional<at::Device> device,
                   c10::SymInt stride_multiple) {
  return rule_mask(kBooleanOp,
                   {{rule, operands, batch_size, q_length, kv_length},
                    q_offset,
                    kv_offset,
                    q_positions,
                    kv_positions,
                    kNoBias,
                    device},
                   at::kBool, kBoolean, Output(kBooleanOp, std::move(stride_multiple)));
}

void boolean_out(c10::SymIntArrayRef rule, at::TensorList operands, c10::SymInt batch_size,
                 c10::SymInt q_length, c10::SymInt kv_length, c10::SymInt q_offset,
                 c10::SymInt kv_offset, const std::optional<at::Tensor>& q_positions,
                 const std::optional<at::Tensor>& kv_positions, std::optional<at::Device> device,
                 const at::Tensor& out) {
  Arguments arguments{{rule, operands, batch_size, q_length, kv_length},
                      q_offset,
                      kv_offset,
                      q_positions,
                      kv_positions,
                      kNoBias,
                      device};
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
                    c10::SymInt stride_multiple) {
  return additive({{rule, operands, batch_size, q_length, kv_length},
                   q_offset,
                   kv_offset,
                   q_positions,
                   kv_positions,
                   bias,
                   device},
                  dtype, Output(kAdditiveOp, std::move(stride_multiple)));
}

void additive_out(c10::SymIntArrayRef rule, at::TensorList operands, c10::SymInt batch_size,
                  c10::SymInt q_length, c10::SymInt kv_length, std::optional<at::ScalarType> dtype,
                  c10::SymInt q_offset, c10::SymInt kv_offset,
                  const std::optional<at::Tensor>& q_positions,
                  const std::optional<at::Tensor>& kv_positions,
                  const std::optional<at::Tensor>& bias, std::optional<at::Device> device,
                  const at::Tensor& out) {
  if (bias) {
    check_no_gradient(kAdditiveOp, "bias", *bias);
  }
  Arguments arguments{{rule, operands, batch_size, q_length, kv_length},
                      q_offset,
                      kv_offset,
                      q_positions,
                      kv_positions,
                      bias,
                      device};
  const Output output(kAdditiveOp, out, inputs_of(arguments));
  arguments.device = output.device(device);
  additive(arguments, output.dtype(dtype), output);
}

at::Tensor additive_autograd(c10::SymIntArrayRef rule, at::TensorList operands,
                             c10::SymInt batch_size, c10::SymInt q_length, c10::SymInt kv_length,
                             at::ScalarType dtype, c10::SymInt q_offset, c10::SymInt kv_offset,
                             const std::optional<at::Tensor>& q_positions,
                             const std::optional<at::Tensor>& kv_positions,
                             const std::optional<at::Tensor>& bias,
                             std::optional<at::Device> device, c10::SymInt stride_multiple) {
  const bool differentiable = c10::GradMode::is_enabled() && bias && bias->requires_grad();
  at::Tensor mask;
  {
    const at::AutoDispatchBelowAutograd below;
    mask = call::additive(rule, operands, batch_size, q_length, kv_length, dtype, q_offset,
                          kv_offset, q_positions, kv_positions, bias, device, stride_multiple);
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
                             q_positions, kv_positions, device, /*stride_multiple=*/1);
  }
  return with_stride_multiple(at::where(attended, *bias, mask), stride_multiple);
}

}  // namespace attn_mask::ops
