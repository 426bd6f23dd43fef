#pragma once

// The two forms of an operator that writes a mask, of one function.

#include <tuple>
#include <utility>
#include <vector>

#include "ops/core/operators.h"
#include "ops/core/output.h"

namespace attn_mask::ops {

/// An argument in the form with `out`, which may leave the dtype to it.
template <typename Argument>
using BesideOut = std::conditional_t<std::is_same_v<Argument, at::ScalarType>,
                                     std::optional<at::ScalarType>, Argument>;

inline void add_tensors(std::vector<at::Tensor>& to, const at::Tensor& tensor) {
  to.push_back(tensor);
}
inline void add_tensors(std::vector<at::Tensor>& to, const std::optional<at::Tensor>& tensor) {
  if (tensor) {
    to.push_back(*tensor);
  }
}
inline void add_tensors(std::vector<at::Tensor>& to, at::TensorList tensors) {
  to.insert(to.end(), tensors.begin(), tensors.end());
}
template <typename Other>
void add_tensors(std::vector<at::Tensor>&, const Other&) {}

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

template <typename Operator, typename Run = typename Operator::Run>
struct Forms;

template <typename Operator, typename Result, typename... Arguments>
struct Forms<Operator, Result(const Output&, Arguments...)> {
  static Result fresh(Arguments... arguments, c10::SymInt stride_multiple) {
    return Operator::run(Output(Operator::kName, std::move(stride_multiple)),
                         std::forward<Arguments>(arguments)...);
  }

  static void out(BesideOut<Arguments>... arguments, const at::Tensor& out) {
    std::vector<at::Tensor> inputs;
    (add_tensors(inputs, arguments), ...);
    const Output output(Operator::kName, out, inputs, Operator::kMayWriteInPlace);
    // In braces, so that the dtype is checked before the device.
    std::apply(&Operator::run,
               std::tuple<const Output&, Arguments...>{
                   output, of_output(output, std::forward<BesideOut<Arguments>>(arguments))...});
  }
};

}  // namespace attn_mask::ops
