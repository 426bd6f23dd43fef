// How attention by a rule is differentiated: once, backward.

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <iterator>
#include <tuple>
#include <utility>
#include <vector>

#include "ops/core/call.h"
#include "ops/core/checks.h"
#include "ops/core/operators.h"

namespace attn_mask::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

bool needs_gradient(std::initializer_list<at::Tensor> tensors) {
  return c10::GradMode::is_enabled() &&
         std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor& tensor) {
           return tensor.defined() && tensor.requires_grad();
         });
}

constexpr auto kDifferentiated = "scaled_dot_product_attention: expected to be differentiated ";

/// Throws for forward-mode derivatives, which would be lost.
void check_no_tangent(std::initializer_list<at::Tensor> tensors) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      std::none_of(tensors.begin(), tensors.end(),
                   [](const at::Tensor& tensor) {
                     return tensor.defined() && tensor._fw_grad(/*level=*/0).defined();
                   }),
      kDifferentiated,
      "backward, but got a tensor with a tangent, for which its operator has no formula");
}

/// Autograd functions of C++ know nothing of torch.func.
void check_no_transform() {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !c10::impl::tls_is_dispatch_key_included(at::DispatchKey::FuncTorchDynamicLayerBackMode),
      kDifferentiated,
      "by torch.autograd, but its operator was called within a transform of torch.func");
}

std::optional<at::Tensor> optional_of(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

/// What autograd keeps of a tensor that needs no gradient. It keeps none of inference mode.
at::Tensor savable(const std::optional<at::Tensor>& tensor) {
  return !tensor ? at::Tensor() : tensor->is_inference() ? tensor->clone() : *tensor;
}

using Given = ScaledDotProductAttention::Given;

class Attend : public torch::autograd::Function<Attend> {
 public:
  static variable_list forward(AutogradContext* context, const at::Tensor& query,
                               const at::Tensor& key, const at::Tensor& value, const Given& given) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [out, lse] = call_with<ScaledDotProductAttention>(given);
    variable_list saved{query,
                        key,
                        value,
                        out,
                        lse,
                        savable(given.get<"q_positions">()),
                        savable(given.get<"kv_positions">())};
    const at::TensorList operands = given.get<"operands">();
    std::transform(operands.begin(), operands.end(), std::back_inserter(saved), savable);
    context->save_for_backward(std::move(saved));
    if (!query.requires_grad() && !key.requires_grad()) {
      context->mark_non_differentiable({lse});
    }
    context->set_materialize_grads(false);
    auto& data = context->saved_data;
    data["rule"] = given.get<"rule">();
    data["q_offset"] = given.get<"q_offset">();
    data["kv_offset"] = given.get<"kv_offset">();
    data["scale"] = given.get<"scale">();
    data["enable_gqa"] = given.get<"enable_gqa">();
    data["max_documents"] = given.get<"max_documents">();
    data["max_length"] = given.get<"max_length">();
    return {out, lse};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const std::vector<at::Tensor> operands(saved.begin() + kOperands, saved.end());
    auto& data = context->saved_data;
    variable_list result(4);  // `given` counts as an argument
    if (!grads[0].defined() && !grads[1].defined()) {
      return result;
    }
    const at::Tensor of_out = grads[0].defined() ? grads[0] : at::zeros_like(saved[3]);
    std::tie(result[0], result[1], result[2]) = call<ScaledDotProductAttentionBackward>(
        data["rule"].toSymIntVector(), operands, of_out, saved[0], saved[1], saved[2], saved[3],
        saved[4], data["q_offset"].toSymInt(), data["kv_offset"].toSymInt(), optional_of(saved[5]),
        optional_of(saved[6]), data["scale"].toOptional<double>(), data["enable_gqa"].toBool(),
        data["max_documents"].toOptional<c10::SymInt>(),
        data["max_length"].toOptional<c10::SymInt>(), optional_of(grads[1]));
    return result;
  }

 private:
  static constexpr int64_t kOperands = 7;
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> ScaledDotProductAttention::autograd(const Given& given) {
  const at::Tensor& query = given.get<"query">();
  const at::Tensor& key = given.get<"key">();
  const at::Tensor& value = given.get<"value">();
  check_strided(kName, "query", query);
  check_strided(kName, "key", key);
  check_strided(kName, "value", value);
  check_no_tangent({query, key, value});
  if (needs_gradient({query, key, value})) {
    check_no_transform();
    const variable_list result = Attend::apply(query, key, value, given);
    return {result[0], result[1]};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_with<ScaledDotProductAttention>(given);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ScaledDotProductAttentionBackward::autograd(
    const Given& given) {
  const at::Tensor& grad_out = given.get<"grad_out">();
  const at::Tensor& query = given.get<"query">();
  const at::Tensor& key = given.get<"key">();
  const at::Tensor& value = given.get<"value">();
  const at::Tensor& out = given.get<"out">();
  const at::Tensor& lse = given.get<"lse">();
  for (const auto& [argument, tensor] : {std::pair("grad_out", &grad_out),
                                         {"query", &query},
                                         {"key", &key},
                                         {"value", &value},
                                         {"out", &out},
                                         {"lse", &lse}}) {
    check_strided(kName, argument, *tensor);
  }
  const at::Tensor of_lse = given.get<"grad_lse">().value_or(at::Tensor());
  if (given.get<"grad_lse">()) {
    check_strided(kName, "grad_lse", of_lse);
  }
  check_no_tangent({grad_out, query, key, value, out, lse, of_lse});
  TORCH_CHECK_NOT_IMPLEMENTED(
      !needs_gradient({grad_out, query, key, value, of_lse}), kDifferentiated,
      "once, but got a backward pass that is differentiated itself (create_graph), which it has no "
      "formula for");
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_with<ScaledDotProductAttentionBackward>(given);
}

}  // namespace attn_mask::ops
