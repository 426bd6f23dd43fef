#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/SymInt.h>

#include <functional>
#include <optional>

#include "ops/core/rule_program.h"
#include "rule/problem.h"

namespace attn_mask {

/// What operators on any rule are given: the program, and the positions of queries and keys. These
/// are an offset ([] or [batch_size, 1]) or a position for each ([length] or [batch_size, length]).
struct RuleArguments {
  RuleProgram program;
  const c10::SymInt& q_offset;
  const c10::SymInt& kv_offset;
  const std::optional<at::Tensor>& q_positions;
  const std::optional<at::Tensor>& kv_positions;
  std::optional<at::Device> device;
};

/// The device of the result: the given one, else that of the first tensor, `another` last, else the
/// CPU.
at::Device device_of(const char* op, const RuleArguments& arguments,
                     const std::optional<at::Tensor>& another = std::nullopt);

/// Checks the arguments and decodes them into a kernel's own `problem`: its rule and positions,
/// without a batch size, heads and lengths; under Meta it points nowhere. A result that has parts
/// is for evaluate_in_parts.
Decoded decode_problem(const char* op, const RuleArguments& arguments, at::Device device,
                       Problem& problem);

/// Solves a problem whose rule is too large for kernels, `height` rows at a time: `solve` gets
/// the first row and a problem of some rows, whose rule has the results of its parts in it.
void evaluate_in_parts(const char* op, const RuleProgram& program, const Problem& problem,
                       at::Device device, int64_t height,
                       const std::function<void(int64_t first, const Problem& rows)>& solve);

/// How many rows may be evaluated at once so that memory beside the mask stays small.
int64_t height_of_parts(const Problem& problem);

}  // namespace attn_mask
