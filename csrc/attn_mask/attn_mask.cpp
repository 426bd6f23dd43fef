#include "attn_mask/attn_mask.h"

#include <ATen/core/DimVector.h>

#include "ops/core/call.h"
#include "ops/core/checks.h"
#include "ops/sdpa_decision.h"

namespace attn_mask {
namespace {

std::optional<c10::SymInt> symbolic(std::optional<int64_t> size) {
  return size ? std::optional<c10::SymInt>(*size) : std::nullopt;
}

c10::SymDimVector symbolic(at::IntArrayRef sizes) { return {sizes.begin(), sizes.end()}; }

}  // namespace

at::Tensor make_causal_mask(at::IntArrayRef input_ids_shape, at::ScalarType dtype,
                            at::Device device, int64_t past_key_values_length,
                            std::optional<int64_t> sliding_window) {
  return ops::call<ops::MakeCausalMask>(symbolic(input_ids_shape), past_key_values_length,
                                        symbolic(sliding_window), dtype, device, ops::kAnyStride);
}

at::Tensor expand_mask(const at::Tensor& mask, at::ScalarType dtype,
                       std::optional<int64_t> tgt_len) {
  return ops::call<ops::ExpandMask>(mask, symbolic(tgt_len), dtype, ops::kAnyStride);
}

at::Tensor unmask_unattended(const at::Tensor& expanded_mask, const at::Scalar& min_dtype) {
  return ops::call<ops::UnmaskUnattended>(expanded_mask, min_dtype, ops::kAnyStride);
}

bool ignore_causal_mask_sdpa(const std::optional<at::Tensor>& attention_mask,
                             const at::Tensor& inputs_embeds, int64_t past_key_values_length,
                             std::optional<int64_t> sliding_window, bool is_training) {
  check_defined(ops::IgnoreCausalMaskSdpa::kName, "attention_mask", attention_mask);
  check_defined(ops::IgnoreCausalMaskSdpa::kName, "inputs_embeds", inputs_embeds);
  return ops::call<ops::IgnoreCausalMaskSdpa>(attention_mask, inputs_embeds, past_key_values_length,
                                              symbolic(sliding_window), is_training);
}

AttentionMaskConverter::AttentionMaskConverter(bool is_causal,
                                               std::optional<int64_t> sliding_window)
    : is_causal_(is_causal), sliding_window_(sliding_window) {
  check_sliding_window(symbolic(sliding_window));
}

std::optional<at::Tensor> AttentionMaskConverter::to_causal_4d(int64_t batch_size,
                                                               int64_t query_length,
                                                               int64_t key_value_length,
                                                               at::ScalarType dtype,
                                                               at::Device device) const {
  TORCH_CHECK_VALUE(is_causal_,
                    "Please use `to_causal_4d` only if attn_mask::AttentionMaskConverter has "
                    "`is_causal` set to True.");
  return ops::call<ops::ToCausal4d>(batch_size, query_length, key_value_length, dtype, device,
                                    symbolic(sliding_window_), ops::kAnyStride);
}

at::Tensor AttentionMaskConverter::to_4d(const at::Tensor& attention_mask_2d, int64_t query_length,
                                         at::ScalarType dtype,
                                         std::optional<int64_t> key_value_length) const {
  return ops::call<ops::To4d>(attention_mask_2d, query_length, dtype, symbolic(key_value_length),
                              is_causal_, symbolic(sliding_window_), /*unmask_unattended=*/false,
                              ops::kAnyStride);
}

std::optional<at::Tensor> prepare_4d_causal_attention_mask(
    const std::optional<at::Tensor>& attention_mask, at::IntArrayRef input_shape,
    const at::Tensor& inputs_embeds, int64_t past_key_values_length,
    std::optional<int64_t> sliding_window) {
  check_defined(ops::Prepare4dCausalAttentionMask::kName, "attention_mask", attention_mask);
  check_defined(ops::Prepare4dCausalAttentionMask::kName, "inputs_embeds", inputs_embeds);
  return ops::call<ops::Prepare4dCausalAttentionMask>(attention_mask, symbolic(input_shape),
                                                      inputs_embeds, past_key_values_length,
                                                      symbolic(sliding_window), ops::kAnyStride);
}

std::optional<at::Tensor> prepare_4d_causal_attention_mask_for_sdpa(
    const std::optional<at::Tensor>& attention_mask, at::IntArrayRef input_shape,
    const at::Tensor& inputs_embeds, int64_t past_key_values_length,
    std::optional<int64_t> sliding_window, bool allow_skip, std::optional<bool> unmask_unattended) {
  check_defined(ops::Prepare4dCausalAttentionMaskForSdpa::kName, "attention_mask", attention_mask);
  check_defined(ops::Prepare4dCausalAttentionMaskForSdpa::kName, "inputs_embeds", inputs_embeds);
  // An operator must not return its argument; this function may.
  if (is_result(attention_mask, unmask_unattended)) {
    return attention_mask;
  }
  return ops::call<ops::Prepare4dCausalAttentionMaskForSdpa>(
      attention_mask, symbolic(input_shape), inputs_embeds, past_key_values_length,
      symbolic(sliding_window), allow_skip, unmask_unattended, ops::kAnyStride);
}

at::Tensor prepare_4d_attention_mask(const at::Tensor& mask, at::ScalarType dtype,
                                     std::optional<int64_t> tgt_len) {
  return ops::call<ops::Prepare4dAttentionMask>(mask, symbolic(tgt_len), dtype, ops::kAnyStride);
}

std::optional<at::Tensor> prepare_4d_attention_mask_for_sdpa(const at::Tensor& mask,
                                                             at::ScalarType dtype,
                                                             std::optional<int64_t> tgt_len,
                                                             bool allow_skip) {
  return ops::call<ops::Prepare4dAttentionMaskForSdpa>(mask, symbolic(tgt_len), dtype, allow_skip,
                                                       ops::kAnyStride);
}

std::optional<at::Tensor> create_4d_causal_attention_mask(at::IntArrayRef input_shape,
                                                          at::ScalarType dtype, at::Device device,
                                                          int64_t past_key_values_length,
                                                          std::optional<int64_t> sliding_window) {
  return ops::call<ops::Create4dCausalAttentionMask>(symbolic(input_shape), past_key_values_length,
                                                     symbolic(sliding_window), dtype, device,
                                                     ops::kAnyStride);
}

}  // namespace attn_mask
