#include "attention/flash_call.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <limits>

#include "attention/flash.h"
#include "ops/core/device_kernels.h"
#include "ops/core/dtypes.h"

namespace attn_mask {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// Queries or keys as the kernels take them: [b, n, h, d] or, of documents, [b * n, h, d].
at::Tensor to_flash(const at::Tensor& tensor, bool packed) {
  const at::Tensor by_length = tensor.transpose(1, 2);
  return packed ? by_length.reshape({-1, tensor.size(1), tensor.size(3)}) : by_length;
}

at::Tensor from_flash(const at::Tensor& tensor, const at::Tensor& like, bool packed) {
  const at::Tensor by_length =
      packed ? tensor.view({like.size(0), like.size(2), like.size(1), tensor.size(2)}) : tensor;
  return by_length.transpose(1, 2);
}

/// Where documents begin in all batch rows, one after the other, int32 [documents + 1]; after the
/// last of them, where all end.
at::Tensor borders(const at::Tensor& ids, int64_t batch_size, const DocumentLimits& limits) {
  // There are no more than tokens.
  const int64_t most = std::min(limits.documents, batch_size * ids.size(1));
  const at::Tensor begins = at::empty({most + 1}, ids.options().dtype(at::kInt));
  const at::Tensor found =
      find_documents(ids, batch_size, {most, limits.length}, begins.mutable_data_ptr<int32_t>());
  at::_assert_async(found.select(0, 3),
                    "scaled_dot_product_attention: expected ids to have at most max_documents "
                    "documents of at most max_length tokens, but they have more or longer ones");
  return begins;
}

struct Packing {
  at::Tensor borders;  // undefined: nothing is packed
  int64_t max_q;
  int64_t max_k;
};

Packing packing_of(const AttentionInputs& inputs, const FlashRule& rule,
                   const std::optional<DocumentLimits>& limits) {
  if (!rule.ids) {
    return {{}, inputs.query.size(2), inputs.key.size(2)};
  }
  return {borders(*rule.ids, inputs.query.size(0), *limits), limits->length, limits->length};
}

std::optional<at::Tensor> optional_of(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

std::optional<int64_t> side(int64_t of) { return of < 0 ? std::nullopt : std::optional(of); }

}  // namespace

at::Tensor find_documents(const at::Tensor& ids, int64_t rows, const DocumentLimits& limits,
                          int32_t* borders) {
  constexpr int64_t kNumbers = sizeof(FoundDocuments) / sizeof(int64_t);
  const at::Tensor found = at::empty({kNumbers}, ids.options().dtype(at::kLong));
  const Table table{
      integers_of(ids), ids.size(0) == 1 ? 0 : ids.stride(0), ids.stride(1), ids.size(1), {}, {}};
  device_kernels(ids.device().type())
      .find_documents({table, rows, limits.documents, limits.length, borders,
                       static_cast<FoundDocuments*>(found.mutable_data_ptr())});
  return found;
}

std::optional<FlashRule> flash_rule(const Problem& problem, at::TensorList operands) {
  const std::optional<attention::FlashBand> band = attention::flash_band(problem);
  if (!band) {
    return std::nullopt;
  }
  if (band->documents == nullptr) {
    return FlashRule{band->left, band->right, std::nullopt};
  }
  for (const at::Tensor& operand : operands) {
    if (operand.const_data_ptr() == band->documents->ids.numbers.data && operand.dim() == 2) {
      return FlashRule{band->left, band->right,
                       operand.narrow(1, problem.q_positions.offset, problem.q_length)};
    }
  }
  return std::nullopt;
}

bool has_flash(const AttentionInputs& inputs) {
  const at::ScalarType dtype = inputs.query.scalar_type();
  const int64_t width = inputs.query.size(3);
  if ((dtype != at::kHalf && dtype != at::kBFloat16) || width != inputs.value.size(3) ||
      width == 0 || width % 8 != 0 || width > 256) {
    return false;
  }
  // It knows the device and what the user has switched off.
  constexpr int64_t kFlash = 1;
  constexpr int64_t kCudnn = 3;
  const int64_t choice =
      at::_fused_sdp_choice(inputs.query, inputs.key, inputs.value, std::nullopt, 0.0, false,
                            inputs.scale, inputs.query.size(1) != inputs.key.size(1));
  return choice == kFlash || choice == kCudnn;
}

Attended attend_by_flash(const AttentionInputs& inputs, const FlashRule& rule,
                         std::optional<DocumentLimits> limits) {
  const Packing packing = packing_of(inputs, rule, limits);
  const bool packed = packing.borders.defined();
  const std::optional<at::Tensor> of_documents = optional_of(packing.borders);
  const bool is_causal = rule.left < 0 && rule.right == 0;
  auto [out, lse, state, unused, mask] = at::_flash_attention_forward(
      to_flash(inputs.query, packed), to_flash(inputs.key, packed), to_flash(inputs.value, packed),
      of_documents, of_documents, packing.max_q, packing.max_k, 0.0, is_causal, false, inputs.scale,
      side(rule.left), side(rule.right));
  if (packed) {  // [h, b * n]
    lse = lse.view({inputs.query.size(1), inputs.query.size(0), inputs.query.size(2)})
              .permute({1, 2, 0});
  } else {
    lse = lse.transpose(1, 2);
  }
  // Kernels give infinity where no key is visible.
  lse = lse.contiguous();
  lse.masked_fill_(lse.eq(kInfinity), -kInfinity);
  return {from_flash(out, inputs.query, packed), lse.transpose(1, 2)};
}

AttentionGradients attend_by_flash_backward(const AttentionInputs& inputs, const FlashRule& rule,
                                            std::optional<DocumentLimits> limits,
                                            const Attended& attended, const at::Tensor& grad_out) {
  const Packing packing = packing_of(inputs, rule, limits);
  const bool packed = packing.borders.defined();
  at::Tensor lse = attended.lse.masked_fill(attended.lse.eq(-kInfinity), kInfinity);
  if (packed) {
    lse = lse.transpose(0, 1).reshape({inputs.query.size(1), -1});
  }
  // Without dropout it is not read.
  const at::Tensor state =
      at::zeros({2}, inputs.query.options().dtype(at::kLong)).view(at::kUInt64);
  const bool is_causal = rule.left < 0 && rule.right == 0;
  auto [of_query, of_key, of_value] = at::_flash_attention_backward(
      to_flash(grad_out, packed), to_flash(inputs.query, packed), to_flash(inputs.key, packed),
      to_flash(inputs.value, packed), to_flash(attended.out, packed), lse.contiguous(),
      packing.borders, packing.borders, packing.max_q, packing.max_k, 0.0, is_causal, state,
      at::empty({0}, state.options()), inputs.scale, side(rule.left), side(rule.right));
  return {from_flash(of_query, inputs.query, packed), from_flash(of_key, inputs.key, packed),
          from_flash(of_value, inputs.value, packed)};
}

}  // namespace attn_mask
