#pragma once

// The operators, as library.cpp registers them: one function each for CPU, CUDA and Meta. Which
// kernel writes the result is looked up by device once shapes and dtypes have been checked.

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/Scalar.h>
#include <c10/core/ScalarType.h>
#include <c10/core/SymInt.h>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

namespace attn_mask::ops {

using OptionalSymInt = std::optional<c10::SymInt>;

// Those that write a mask come in two: a new tensor, whose rows begin a multiple of stride_multiple
// elements apart, or `_out`, into a tensor of the caller's. Where the first gives no mask since
// none is needed, `_out` writes the mask that says the same.

std::optional<at::Tensor> to_causal_4d(c10::SymInt batch_size, c10::SymInt query_length,
                                       c10::SymInt key_value_length, at::ScalarType dtype,
                                       std::optional<at::Device> device,
                                       OptionalSymInt sliding_window, c10::SymInt stride_multiple);
void to_causal_4d_out(c10::SymInt batch_size, c10::SymInt query_length,
                      c10::SymInt key_value_length, std::optional<at::ScalarType> dtype,
                      std::optional<at::Device> device, OptionalSymInt sliding_window,
                      const at::Tensor& out);

at::Tensor make_causal_mask(c10::SymIntArrayRef input_ids_shape, c10::SymInt past_key_values_length,
                            OptionalSymInt sliding_window, at::ScalarType dtype,
                            std::optional<at::Device> device, c10::SymInt stride_multiple);
void make_causal_mask_out(c10::SymIntArrayRef input_ids_shape, c10::SymInt past_key_values_length,
                          OptionalSymInt sliding_window, std::optional<at::ScalarType> dtype,
                          std::optional<at::Device> device, const at::Tensor& out);

std::optional<at::Tensor> create_4d_causal_attention_mask(c10::SymIntArrayRef input_shape,
                                                          c10::SymInt past_key_values_length,
                                                          OptionalSymInt sliding_window,
                                                          at::ScalarType dtype,
                                                          std::optional<at::Device> device,
                                                          c10::SymInt stride_multiple);
void create_4d_causal_attention_mask_out(c10::SymIntArrayRef input_shape,
                                         c10::SymInt past_key_values_length,
                                         OptionalSymInt sliding_window,
                                         std::optional<at::ScalarType> dtype,
                                         std::optional<at::Device> device, const at::Tensor& out);

/// With `unmask_unattended`, rows without a key are opened, as the function of that name would.
at::Tensor to_4d(const at::Tensor& attention_mask_2d, c10::SymInt query_length,
                 at::ScalarType dtype, OptionalSymInt key_value_length, bool is_causal,
                 OptionalSymInt sliding_window, bool unmask_unattended,
                 c10::SymInt stride_multiple);
void to_4d_out(const at::Tensor& attention_mask_2d, c10::SymInt query_length,
               std::optional<at::ScalarType> dtype, OptionalSymInt key_value_length, bool is_causal,
               OptionalSymInt sliding_window, bool unmask_unattended, const at::Tensor& out);

at::Tensor expand_mask(const at::Tensor& mask, OptionalSymInt tgt_len, at::ScalarType dtype,
                       c10::SymInt stride_multiple);
void expand_mask_out(const at::Tensor& mask, OptionalSymInt tgt_len,
                     std::optional<at::ScalarType> dtype, const at::Tensor& out);

at::Tensor prepare_4d_attention_mask(const at::Tensor& mask, OptionalSymInt tgt_len,
                                     at::ScalarType dtype, c10::SymInt stride_multiple);
void prepare_4d_attention_mask_out(const at::Tensor& mask, OptionalSymInt tgt_len,
                                   std::optional<at::ScalarType> dtype, const at::Tensor& out);

std::optional<at::Tensor> prepare_4d_attention_mask_for_sdpa(const at::Tensor& mask,
                                                             OptionalSymInt tgt_len,
                                                             at::ScalarType dtype, bool allow_skip,
                                                             c10::SymInt stride_multiple);
void prepare_4d_attention_mask_for_sdpa_out(const at::Tensor& mask, OptionalSymInt tgt_len,
                                            std::optional<at::ScalarType> dtype, bool allow_skip,
                                            const at::Tensor& out);

std::optional<at::Tensor> prepare_4d_causal_attention_mask(
    const std::optional<at::Tensor>& attention_mask, c10::SymIntArrayRef input_shape,
    const at::Tensor& inputs_embeds, c10::SymInt past_key_values_length,
    OptionalSymInt sliding_window, c10::SymInt stride_multiple);
void prepare_4d_causal_attention_mask_out(const std::optional<at::Tensor>& attention_mask,
                                          c10::SymIntArrayRef input_shape,
                                          const at::Tensor& inputs_embeds,
                                          c10::SymInt past_key_values_length,
                                          OptionalSymInt sliding_window, const at::Tensor& out);

/// `unmask_unattended` (see to_4d): else as the mask's device needs it (needs_unmasking).
std::optional<at::Tensor> prepare_4d_causal_attention_mask_for_sdpa(
    const std::optional<at::Tensor>& attention_mask, c10::SymIntArrayRef input_shape,
    const at::Tensor& inputs_embeds, c10::SymInt past_key_values_length,
    OptionalSymInt sliding_window, bool allow_skip, std::optional<bool> unmask_unattended,
    c10::SymInt stride_multiple);
void prepare_4d_causal_attention_mask_for_sdpa_out(const std::optional<at::Tensor>& attention_mask,
                                                   c10::SymIntArrayRef input_shape,
                                                   const at::Tensor& inputs_embeds,
                                                   c10::SymInt past_key_values_length,
                                                   OptionalSymInt sliding_window, bool allow_skip,
                                                   std::optional<bool> unmask_unattended,
                                                   const at::Tensor& out);

at::Tensor unmask_unattended(const at::Tensor& expanded_mask, const c10::Scalar& min_dtype,
                             c10::SymInt stride_multiple);
void unmask_unattended_out(const at::Tensor& expanded_mask, const c10::Scalar& min_dtype,
                           const at::Tensor& out);

/// The same with a gradient, for floating masks that need one.
at::Tensor unmask_unattended_autograd(const at::Tensor& expanded_mask, const c10::Scalar& min_dtype,
                                      c10::SymInt stride_multiple);

/// Whether attention on a device gives NaN for rows without a key, so that upstream unmasks them
/// there: memory-efficient attention on CUDA and XPU does.
inline constexpr std::array kUnmaskedDevices{at::kCUDA, at::kXPU};
inline bool needs_unmasking(at::Device device) {
  return std::ranges::find(kUnmaskedDevices, device.type()) != kUnmaskedDevices.end();
}

/// A host decision: with a mask to look at, it waits for the mask's device.
bool ignore_causal_mask_sdpa(const std::optional<at::Tensor>& attention_mask,
                             const at::Tensor& inputs_embeds, c10::SymInt past_key_values_length,
                             OptionalSymInt sliding_window, bool is_training);

/// Whether no element of the mask is zero; a host decision, too.
bool is_all_visible(const at::Tensor& mask);

/// Any rule (see rule_program.h) as a boolean mask. With `unmask_unattended`, rows in which no key
/// is visible become true throughout.
at::Tensor boolean(c10::SymIntArrayRef rule, at::TensorList operands, c10::SymInt batch_size,
                   c10::SymInt q_length, c10::SymInt kv_length, c10::SymInt q_offset,
                   c10::SymInt kv_offset, const std::optional<at::Tensor>& q_positions,
                   const std::optional<at::Tensor>& kv_positions, std::optional<at::Device> device,
                   bool unmask_unattended, c10::SymInt stride_multiple);
void boolean_out(c10::SymIntArrayRef rule, at::TensorList operands, c10::SymInt batch_size,
                 c10::SymInt q_length, c10::SymInt kv_length, c10::SymInt q_offset,
                 c10::SymInt kv_offset, const std::optional<at::Tensor>& q_positions,
                 const std::optional<at::Tensor>& kv_positions, std::optional<at::Device> device,
                 bool unmask_unattended, const at::Tensor& out);

/// Any rule as an additive mask, on top of a bias where one is given. Masked elements hold
/// `masked_value`: a number up to 0 that the dtype holds, or -inf; else its lowest finite number.
/// With `unmask_unattended`, rows in which no key is visible become +0.0, or the bias, throughout.
at::Tensor additive(c10::SymIntArrayRef rule, at::TensorList operands, c10::SymInt batch_size,
                    c10::SymInt q_length, c10::SymInt kv_length, at::ScalarType dtype,
                    c10::SymInt q_offset, c10::SymInt kv_offset,
                    const std::optional<at::Tensor>& q_positions,
                    const std::optional<at::Tensor>& kv_positions,
                    const std::optional<at::Tensor>& bias, std::optional<at::Device> device,
                    bool unmask_unattended, const std::optional<c10::Scalar>& masked_value,
                    c10::SymInt stride_multiple);
void additive_out(c10::SymIntArrayRef rule, at::TensorList operands, c10::SymInt batch_size,
                  c10::SymInt q_length, c10::SymInt kv_length, std::optional<at::ScalarType> dtype,
                  c10::SymInt q_offset, c10::SymInt kv_offset,
                  const std::optional<at::Tensor>& q_positions,
                  const std::optional<at::Tensor>& kv_positions,
                  const std::optional<at::Tensor>& bias, std::optional<at::Device> device,
                  bool unmask_unattended, const std::optional<c10::Scalar>& masked_value,
                  const at::Tensor& out);

/// The same with a gradient for the bias.
at::Tensor additive_autograd(
    c10::SymIntArrayRef rule, at::TensorList operands, c10::SymInt batch_size, c10::SymInt q_length,
    c10::SymInt kv_length, at::ScalarType dtype, c10::SymInt q_offset, c10::SymInt kv_offset,
    const std::optional<at::Tensor>& q_positions, const std::optional<at::Tensor>& kv_positions,
    const std::optional<at::Tensor>& bias, std::optional<at::Device> device, bool unmask_unattended,
    const std::optional<c10::Scalar>& masked_value, c10::SymInt stride_multiple);

/// Any rule as flex attention's BlockMask: kv_num_blocks, kv_indices, full_kv_num_blocks,
/// full_kv_indices, q_num_blocks, q_indices, full_q_num_blocks, full_q_indices, all int32; without
/// `separate_full_blocks` not those of full blocks. num_blocks are [batch_size, heads, lines],
/// indices [batch_size, heads, lines, total]. With a width an index is compact storage, 1-D: the
/// first `width` numbers of each line, and as many zeros behind the last as make it a whole one, so
/// that lines that overlap are a view of it. A width must be enough for the longest line; on CUDA
/// the kernel stops where it is not.
std::vector<at::Tensor> block_mask(c10::SymIntArrayRef rule, at::TensorList operands,
                                   c10::SymInt batch_size, c10::SymInt heads, c10::SymInt q_length,
                                   c10::SymInt kv_length, c10::SymInt q_block_size,
                                   c10::SymInt kv_block_size, c10::SymInt q_offset,
                                   c10::SymInt kv_offset,
                                   const std::optional<at::Tensor>& q_positions,
                                   const std::optional<at::Tensor>& kv_positions,
                                   std::optional<at::Device> device, bool separate_full_blocks,
                                   OptionalSymInt kv_width, OptionalSymInt q_width);

/// What each block holds (BlockState), uint8 [batch_size or 1, heads or 1, q_blocks, kv_blocks]:
/// for masks that are put together from parts.
at::Tensor block_states(c10::SymIntArrayRef rule, at::TensorList operands, c10::SymInt batch_size,
                        c10::SymInt heads, c10::SymInt q_length, c10::SymInt kv_length,
                        c10::SymInt q_block_size, c10::SymInt kv_block_size, c10::SymInt q_offset,
                        c10::SymInt kv_offset, const std::optional<at::Tensor>& q_positions,
                        const std::optional<at::Tensor>& kv_positions,
                        std::optional<at::Device> device);

/// Widths for compact storage (kv, q): what windows and chunks declare, else as many as the longest
/// lines need, a host decision that waits for the device.
std::vector<int64_t> block_mask_widths(c10::SymIntArrayRef rule, at::TensorList operands,
                                       c10::SymInt batch_size, c10::SymInt heads,
                                       c10::SymInt q_length, c10::SymInt kv_length,
                                       c10::SymInt q_block_size, c10::SymInt kv_block_size,
                                       c10::SymInt q_offset, c10::SymInt kv_offset,
                                       const std::optional<at::Tensor>& q_positions,
                                       const std::optional<at::Tensor>& kv_positions,
                                       std::optional<at::Device> device, bool separate_full_blocks);

}  // namespace attn_mask::ops
