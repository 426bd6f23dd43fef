#pragma once

/// Attention masks for LibTorch model code: rules, from which any mask can be composed (rules.h),
/// and the functions of transformers' `modeling_attn_mask_utils` with their argument order and, but
/// for the differences that docs/upstream.md lists, their results (releases 4.45 to 5.23).
///
/// Additive masks hold 0 where a query attends to a key and the lowest finite number of their dtype
/// elsewhere; dtypes are kHalf, kBFloat16, kFloat and kDouble. Sizes: b batch_size, q query_length,
/// kv key_value_length. A window of W lets a query attend to itself and the W keys before it. A 2-D
/// padding mask [b, kv] of any real dtype attends where its element, cast to the result's dtype,
/// equals 1.
///
/// Errors, all of them before anything is written: c10::ValueError (shapes, sizes, windows),
/// c10::TypeError (dtypes, layouts, undefined tensors), c10::NotImplementedError (devices; a window
/// without causality). Their texts are those of the Python functions named here.
///
/// Any number of threads may call these functions at once.

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/Scalar.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <optional>

#include "attn_mask/attention.h"
#include "attn_mask/export.h"
#include "attn_mask/rules.h"

namespace attn_mask {

/// `AttentionMaskConverter._make_causal_mask`: [b, 1, q, q + past], the batch a stride-0 expand.
ATTN_MASK_API at::Tensor make_causal_mask(at::IntArrayRef input_ids_shape, at::ScalarType dtype,
                                          at::Device device, int64_t past_key_values_length = 0,
                                          std::optional<int64_t> sliding_window = std::nullopt);

/// `AttentionMaskConverter._expand_mask`: [b, kv] to [b, 1, tgt_len or kv, kv], not causal.
ATTN_MASK_API at::Tensor expand_mask(const at::Tensor& mask, at::ScalarType dtype,
                                     std::optional<int64_t> tgt_len = std::nullopt);

/// `AttentionMaskConverter._unmask_unattended`: a copy of [..., q, kv] in which the rows that hold
/// `min_dtype` throughout are unmasked: their elements become -0.0 (0 with the sign they had).
ATTN_MASK_API at::Tensor unmask_unattended(const at::Tensor& expanded_mask,
                                           const at::Scalar& min_dtype);

/// `AttentionMaskConverter._ignore_causal_mask_sdpa`: whether scaled_dot_product_attention can do
/// without the mask, by its `is_causal` argument. With a 2-D mask on a CUDA device this waits for
/// it.
ATTN_MASK_API bool ignore_causal_mask_sdpa(const std::optional<at::Tensor>& attention_mask,
                                           const at::Tensor& inputs_embeds,
                                           int64_t past_key_values_length,
                                           std::optional<int64_t> sliding_window = std::nullopt,
                                           bool is_training = false);

/// `AttentionMaskConverter`: a causal flag and a window, and the masks for them.
class ATTN_MASK_API AttentionMaskConverter {
 public:
  explicit AttentionMaskConverter(bool is_causal,
                                  std::optional<int64_t> sliding_window = std::nullopt);

  /// [b, 1, q, kv], the batch a stride-0 expand; nothing when one query without a window needs no
  /// mask.
  std::optional<at::Tensor> to_causal_4d(int64_t batch_size, int64_t query_length,
                                         int64_t key_value_length, at::ScalarType dtype,
                                         at::Device device = at::kCPU) const;

  /// [b, 1, q, kv] of a padding mask [b, kv], on its device. A causal converter needs
  /// `key_value_length` unless there is one query and no window.
  at::Tensor to_4d(const at::Tensor& attention_mask_2d, int64_t query_length, at::ScalarType dtype,
                   std::optional<int64_t> key_value_length = std::nullopt) const;

  bool is_causal() const { return is_causal_; }
  std::optional<int64_t> sliding_window() const { return sliding_window_; }

 private:
  bool is_causal_;
  std::optional<int64_t> sliding_window_;
};

/// `_prepare_4d_causal_attention_mask`, for attention written out. `input_shape` is (b, q); the
/// mask is [b, kv], or [b, 1, q, kv] of ones and zeros (booleans: true attends), or absent (pure
/// causality); dtype and device are those of `inputs_embeds`.
ATTN_MASK_API std::optional<at::Tensor> prepare_4d_causal_attention_mask(
    const std::optional<at::Tensor>& attention_mask, at::IntArrayRef input_shape,
    const at::Tensor& inputs_embeds, int64_t past_key_values_length,
    std::optional<int64_t> sliding_window = std::nullopt);

/// `_prepare_4d_causal_attention_mask_for_sdpa`: as above, for scaled_dot_product_attention;
/// nothing where its `is_causal` will do. With `allow_skip` false the padding mask's values are not
/// read and that is never so. `unmask_unattended`: whether rows without a key are unmasked, as
/// unmask_unattended does; absent: on CUDA and XPU. Where not, a 4-D mask comes back as it is.
ATTN_MASK_API std::optional<at::Tensor> prepare_4d_causal_attention_mask_for_sdpa(
    const std::optional<at::Tensor>& attention_mask, at::IntArrayRef input_shape,
    const at::Tensor& inputs_embeds, int64_t past_key_values_length,
    std::optional<int64_t> sliding_window = std::nullopt, bool allow_skip = true,
    std::optional<bool> unmask_unattended = std::nullopt);

/// `_prepare_4d_attention_mask`: [b, kv] to [b, 1, tgt_len or kv, kv], not causal.
ATTN_MASK_API at::Tensor prepare_4d_attention_mask(const at::Tensor& mask, at::ScalarType dtype,
                                                   std::optional<int64_t> tgt_len = std::nullopt);

/// `_prepare_4d_attention_mask_for_sdpa`: as above; nothing when the mask is all ones and
/// `allow_skip` permits reading its values.
ATTN_MASK_API std::optional<at::Tensor> prepare_4d_attention_mask_for_sdpa(
    const at::Tensor& mask, at::ScalarType dtype, std::optional<int64_t> tgt_len = std::nullopt,
    bool allow_skip = true);

/// `_create_4d_causal_attention_mask`: [b, 1, q, q + past], or nothing for one query without a
/// window.
ATTN_MASK_API std::optional<at::Tensor> create_4d_causal_attention_mask(
    at::IntArrayRef input_shape, at::ScalarType dtype, at::Device device,
    int64_t past_key_values_length = 0, std::optional<int64_t> sliding_window = std::nullopt);

}  // namespace attn_mask
