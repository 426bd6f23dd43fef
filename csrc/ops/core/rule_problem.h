#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/SymInt.h>

#include <functional>
#include <optional>
#include <utility>

#include "ops/core/rule_program.h"
#include "rule/problem.h"

namespace attn_mask {

/// What operators on any rule are given: the program, and the positions of queries and keys. These
/// are an offset ([] or [batch_size, 1]) or a position for each ([length] or [batch_size, length]).
/// The arguments of a call (ops/core/schema.h) have them by these names.
struct RuleArguments {
  template <typename Given>
  explicit RuleArguments(const Given& given)
      : RuleArguments(given, given.template get<"batch_size">(), given.template get<"q_length">(),
                      given.template get<"kv_length">()) {}

  /// Of operators that have sizes from elsewhere.
  template <typename Given>
  RuleArguments(const Given& given, c10::SymInt batch_size, c10::SymInt q_length,
                c10::SymInt kv_length)
      : program{given.template get<"rule">(), given.template get<"operands">(),
                std::move(batch_size), std::move(q_length), std::move(kv_length)},
        q_offset(given.template get<"q_offset">()),
        kv_offset(given.template get<"kv_offset">()),
        q_positions(given.template get_or<"q_positions">(std::optional<at::Tensor>())),
        kv_positions(given.template get_or<"kv_positions">(std::optional<at::Tensor>())),
        device(given.template get_or<"device">(std::optional<at::Device>())) {}

  RuleProgram program;
  c10::SymInt q_offset;
  c10::SymInt kv_offset;
  std::optional<at::Tensor> q_positions;
  std::optional<at::Tensor> kv_positions;
  std::optional<at::Device> device;
};

/// The device of the result: the given one, else that of the first tensor, `another` last, else the
/// CPU.
at::Device device_of(const char* op, const RuleArguments& arguments,
                     const std::optional<at::Tensor>& another = std::nullopt);

/// Checks the arguments and decodes them into a kernel's own `problem`; under Meta it points
/// nowhere and has no sizes. A result that has parts is for evaluate_in_parts.
Decoded decode_problem(const char* op, const RuleArguments& arguments, at::Device device,
                       Problem& problem);

/// Bits operands must have one head, or `heads`.
void check_heads(const char* op, const Decoded& decoded, const c10::SymInt& heads);

/// Solves a problem whose rule is too large for kernels, `height` rows at a time: `solve` gets
/// the first row and a problem of some rows, whose rule has the results of its parts in it.
void evaluate_in_parts(const char* op, const RuleProgram& program, const Problem& problem,
                       at::Device device, int64_t height,
                       const std::function<void(int64_t first, const Problem& rows)>& solve);

/// How many rows may be evaluated at once so that memory beside the mask stays small.
int64_t height_of_parts(const Problem& problem);

}  // namespace attn_mask
