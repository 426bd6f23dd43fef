#pragma once

// What is registered of an operator: its functions, called with what the dispatcher passes.

#include <algorithm>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "ops/core/operators.h"
#include "ops/core/output.h"

namespace attn_mask::ops {

/// An argument in the form with `out`, which may leave the dtype to it.
template <typename Argument>
using BesideOut = std::conditional_t<std::is_same_v<Argument, at::ScalarType>,
                                     std::optional<at::ScalarType>, Argument>;

/// Calls `visit` with each tensor that an argument holds.
template <typename Argument, typename Visit>
void for_each_tensor_of(const Argument& argument, Visit visit) {
  if constexpr (std::is_same_v<Argument, at::Tensor>) {
    visit(argument);
  } else if constexpr (std::is_same_v<Argument, std::optional<at::Tensor>>) {
    if (argument) {
      visit(*argument);
    }
  } else if constexpr (std::is_same_v<Argument, at::TensorList>) {
    std::for_each(argument.begin(), argument.end(), visit);
  }
}

inline at::ScalarType of_output(const Output& output, std::optional<at::ScalarType> wanted) {
  return output.dtype(wanted);
}
inline std::optional<at::Device> of_output(const Output& output, std::optional<at::Device> wanted) {
  return output.device(wanted);
}
template <typename Other>
Other&& of_output(const Output&, Other&& other) {
  return std::forward<Other>(other);
}

template <typename Operator, typename Call = typename Operator::Call>
struct Forms;

template <typename Operator, typename Result, typename... Arguments>
struct Forms<Operator, Result(Arguments...)> {
  static Result run(Arguments... arguments) {
    const typename Operator::Given given(std::forward<Arguments>(arguments)...);
    if constexpr (Operator::kWritesMask) {
      return Operator::run(Output(Operator::kName, given.template get<"stride_multiple">()), given);
    } else {
      return Operator::run(given);
    }
  }

  static Result autograd(Arguments... arguments) {
    return Operator::autograd(typename Operator::Given(std::forward<Arguments>(arguments)...));
  }
};

/// The form of an operator that writes a mask into a tensor of the caller's: in place of its last
/// argument there is `out`.
template <typename Operator,
          typename Others = std::make_index_sequence<Operator::kArguments.size() - 1>>
struct OutForm;

template <typename Operator, size_t... Index>
struct OutForm<Operator, std::index_sequence<Index...>> {
  template <size_t I>
  using Argument = BesideOut<typename Operator::template Argument<I>>;

  static void run(Argument<Index>... arguments, const at::Tensor& out) {
    std::vector<at::Tensor> inputs;
    const auto add = [&](const at::Tensor& tensor) { inputs.push_back(tensor); };
    (for_each_tensor_of(arguments, add), ...);
    const Output output(Operator::kName, out, inputs, Operator::kMayWriteInPlace);
    // In braces, so that the dtype is checked before the device.
    const typename Operator::Given given{
        of_output(output, std::forward<Argument<Index>>(arguments))..., c10::SymInt(1)};
    Operator::run(output, given);
  }
};

}  // namespace attn_mask::ops
