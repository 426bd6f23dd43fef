// How attention by a rule is differentiated: once, backward.

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <iterator>
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

std::optional<c10::SymInt> optional_int_of(const c10::IValue& value) {
  return value.isNone() ? std::nullopt : std::optional(value.toSymInt());
}

/// What autograd keeps of a tensor that needs no gradient. It keeps none of inference mode.
at::Tensor savable(const std::optional<at::Tensor>& tensor) {
  return !tensor ? at::Tensor() : tensor->is_inference() ? tensor->clone() : *tensor;
}

c10::IValue value_of(const OptionalSymInt& number) {
  return number ? c10::IValue(*number) : c10::IValue();
}

class Attend : public torch::autograd::Function<Attend> {
 public:
  static variable_list forward(AutogradContext* context, const at::Tensor& query,
                               const at::Tensor& key, const at::Tensor& value,
                               c10::SymIntArrayRef rule, at::TensorList operands,
                               const c10::SymInt& q_offset, const c10::SymInt& kv_offset,
                               const std::optional<at::Tensor>& q_positions,
                               const std::optional<at::Tensor>& kv_positions,
                               std::optional<double> scale, bool enable_gqa,
                               const OptionalSymInt& max_documents,
                               const OptionalSymInt& max_length) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [out, lse] = call<ScaledDotProductAttention>(rule, operands, query, key, value, q_offset,
                                                      kv_offset, q_positions, kv_positions, scale,
                                                      enable_gqa, max_documents, max_length);
    variable_list saved{query, key, value, out, lse, savable(q_positions), savable(kv_positions)};
    std::transform(operands.begin(), operands.end(), std::back_inserter(saved), savable);
    context->save_for_backward(std::move(saved));
    if (!query.requires_grad() && !key.requires_grad()) {
      context->mark_non_differentiable({lse});
    }
    context->set_materialize_grads(false);
    auto& data = context->saved_data;
    data["rule"] = c10::IValue(rule);
    data["q_offset"] = q_offset;
    data["kv_offset"] = kv_offset;
    data["scale"] = scale ? c10::IValue(*scale) : c10::IValue();
    data["enable_gqa"] = enable_gqa;
    data["max_documents"] = value_of(max_documents);
    data["max_length"] = value_of(max_length);
    return {out, lse};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    auto& data = context->saved_data;
    const std::vector<c10::SymInt> rule = data["rule"].toSymIntVector();
    const std::vector<at::Tensor> operands(saved.begin() + kOperands, saved.end());
    const c10::IValue& scale = data["scale"];
    variable_list result(kOthers + operands.size());
    if (!grads[0].defined() && !grads[1].defined()) {
      return result;
    }
    const at::Tensor of_out = grads[0].defined() ? grads[0] : at::zeros_like(saved[3]);
    auto [of_query, of_key, of_value] = call<ScaledDotProductAttentionBackward>(
        rule, operands, of_out, saved[0], saved[1], saved[2], saved[3], saved[4],
        data["q_offset"].toSymInt(), data["kv_offset"].toSymInt(), optional_of(saved[5]),
        optional_of(saved[6]), scale.isNone() ? std::nullopt : std::optional(scale.toDouble()),
        data["enable_gqa"].toBool(), optional_int_of(data["max_documents"]),
        optional_int_of(data["max_length"]), optional_of(grads[1]));
    result[0] = of_query;
    result[1] = of_key;
    result[2] = of_value;
    return result;
  }

 private:
  static constexpr int64_t kOperands = 7;
  static constexpr size_t kOthers = 12;  // than operands, each of which counts as an argument
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> ScaledDotProductAttention::autograd(
    c10::SymIntArrayRef rule, at::TensorList operands, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, c10::SymInt q_offset, c10::SymInt kv_offset,
    const std::optional<at::Tensor>& q_positions, const std::optional<at::Tensor>& kv_positions,
    std::optional<double> scale, bool enable_gqa, OptionalSymInt max_documents,
    OptionalSymInt max_length) {
  check_strided(kName, "query", query);
  check_strided(kName, "key", key);
  check_strided(kName, "value", value);
  check_no_tangent({query, key, value});
  if (needs_gradient({query, key, value})) {
    check_no_transform();
    const variable_list result =
        Attend::apply(query, key, value, rule, operands, q_offset, kv_offset, q_positions,
                      kv_positions, scale, enable_gqa, max_documents, max_length);
    return {result[0], result[1]};
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return call<ScaledDotProductAttention>(
      rule, operands, query, key, value, std::move(q_offset), std::move(kv_offset), q_positions,
      kv_positions, scale, enable_gqa, std::move(max_documents), std::move(max_length));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ScaledDotProductAttentionBackward::autograd(
    c10::SymIntArrayRef rule, at::TensorList operands, const at::Tensor& grad_out,
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& out,
    const at::Tensor& lse, c10::SymInt q_offset, c10::SymInt kv_offset,
    const std::optional<at::Tensor>& q_positions, const std::optional<at::Tensor>& kv_positions,
    std::optional<double> scale, bool enable_gqa, OptionalSymInt max_documents,
    OptionalSymInt max_length, const std::optional<at::Tensor>& grad_lse) {
  for (const auto& [argument, tensor] : {std::pair("grad_out", &grad_out),
                                         {"query", &query},
                                         {"key", &key},
                                         {"value", &value},
                                         {"out", &out},
                                         {"lse", &lse}}) {
    check_strided(kName, argument, *tensor);
  }
  const at::Tensor of_lse = grad_lse.value_or(at::Tensor());
  if (grad_lse) {
    check_strided(kName, "grad_lse", of_lse);
  }
  check_no_tangent({grad_out, query, key, value, out, lse, of_lse});
  TORCH_CHECK_NOT_IMPLEMENTED(
      !needs_gradient({grad_out, query, key, value, of_lse}), kDifferentiated,
      "once, but got a backward pass that is differentiated itself (create_graph), which it has no "
      "formula for");
  const at::AutoDispatchBelowADInplaceOrView below;
  return call<ScaledDotProductAttentionBackward>(
      rule, operands, grad_out, query, key, value, out, lse, std::move(q_offset),
      std::move(kv_offset), q_positions, kv_positions, scale, enable_gqa, std::move(max_documents),
      std::move(max_length), grad_lse);
}

}  // namespace attn_mask::ops
