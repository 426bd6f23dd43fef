#include "ops/core/rule_problem.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "format/boolean.h"
#include "ops/core/checks.h"
#include "ops/core/dtypes.h"
#include "ops/core/write_mask.h"
#include "rule/levels/runs.h"

namespace attn_mask {
namespace {

/// The arguments that say where queries or keys are.
struct Line {
  const char* offset_argument;
  const c10::SymInt& offset;
  const char* argument;
  const std::optional<at::Tensor>& tensor;
  const c10::SymInt& length;
};

/// Positions of rows or columns, and whether they differ within the batch.
Positions positions_of(const char* op, const Line& line, const c10::SymInt& batch_size,
                       at::Device device, bool& depends_on_batch) {
  const auto& [offset_argument, offset, argument, tensor, length] = line;
  const bool with_data = !device.is_meta();
  if (const auto known = offset.maybe_as_int()) {
    check_within_far(op, *known, offset_argument);
  }
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

// The results of a part of a rule are held beside the mask for so many bytes of rows at once.
constexpr int64_t kPartBytes = int64_t{2} << 20;

}  // namespace

at::Device device_of(const char* op, const RuleArguments& arguments,
                     const std::optional<at::Tensor>& another) {
  std::optional<at::Device> of_tensors;
  if (!arguments.program.operands.empty()) {
    of_tensors = arguments.program.operands[0].device();
  } else if (arguments.q_positions) {
    of_tensors = arguments.q_positions->device();
  } else if (arguments.kv_positions) {
    of_tensors = arguments.kv_positions->device();
  } else if (another) {
    of_tensors = another->device();
  }
  if (of_tensors) {
    const bool same = !arguments.device || is_same_device(*arguments.device, *of_tensors);
    TORCH_CHECK_VALUE(same || of_tensors->is_meta(), op,
                      ": expected device to be that of the operands, which is ", *of_tensors,
                      ", but got ", *arguments.device);
    return *of_tensors;
  }
  return arguments.device.value_or(at::kCPU);
}

Decoded decode_problem(const char* op, const RuleArguments& arguments, at::Device device,
                       Problem& problem) {
  const RuleProgram& program = arguments.program;
  check_size(op, "batch_size", program.batch_size);
  check_size(op, "q_length", program.q_length);
  check_size(op, "kv_length", program.kv_length);
  Decoded decoded = decode_rule(op, program, device, !device.is_meta(), problem.rule);
  problem.q_positions = positions_of(
      op, {"q_offset", arguments.q_offset, "q_positions", arguments.q_positions, program.q_length},
      program.batch_size, device, decoded.depends_on_batch);
  problem.kv_positions = positions_of(
      op,
      {"kv_offset", arguments.kv_offset, "kv_positions", arguments.kv_positions, program.kv_length},
      program.batch_size, device, decoded.depends_on_batch);
  if (!device.is_meta()) {
    problem.batch_size = program.batch_size.expect_int();
    problem.heads = decoded.heads.expect_int();
    problem.q_length = program.q_length.expect_int();
    problem.kv_length = program.kv_length.expect_int();
  }
  return decoded;
}

void check_heads(const char* op, const Decoded& decoded, const c10::SymInt& heads) {
  if (decoded.heads.maybe_as_int() != 1) {
    ATTN_MASK_CHECK_SYM_VALUE(decoded.heads.sym_eq(heads), op,
                              ": expected bits operands to have 1 or ", heads, " heads, but got ",
                              decoded.heads);
  }
}

void evaluate_in_parts(const char* op, const RuleProgram& program, const Problem& problem,
                       at::Device device, int64_t height,
                       const std::function<void(int64_t first, const Problem& rows)>& solve) {
  for (int64_t begin = 0; begin < problem.q_length; begin += height) {
    Problem rows = problem.part(begin, std::min(begin + height, problem.q_length));
    std::vector<at::Tensor> results;
    const auto bits_of_part = [&](const Rule& part) -> Padding {
      const at::Tensor bits =
          at::empty({rows.batch_size, rows.heads, rows.q_length, rows.kv_length},
                    at::TensorOptions().dtype(at::kBool).device(device));
      MaskParams of_part{};
      set_output(of_part, bits, kBoolean);
      of_part.rule = part;
      of_part.q_positions = rows.q_positions;
      of_part.kv_positions = rows.kv_positions;
      prepare_and_run(of_part, device);
      // The results of the part's own parts have been used.
      std::erase_if(results, [&](const at::Tensor& result) {
        return std::any_of(part.nodes, part.nodes + part.size, [&](const Rule::Node& node) {
          return node.kind == Rule::Kind::kPadding && node.padding.mask == result.const_data_ptr();
        });
      });
      results.push_back(bits);
      return bits_leaf(bits, /*first_row=*/0, is_nonzero(at::kBool));
    };
    decode_rule(op, program, device, /*with_data=*/true, rows.rule, begin, bits_of_part);
    solve(begin, rows);
  }
}

int64_t height_of_parts(const Problem& problem) {
  const int64_t row_bytes = problem.batch_size * problem.heads * problem.kv_length;
  return std::max<int64_t>(1, kPartBytes / std::max<int64_t>(1, row_bytes));
}

}  // namespace attn_mask
