#pragma once

// The operators, as library.cpp registers them: one function each for CPU, CUDA and Meta. Which
// kernel writes the result is looked up by device once shapes and dtypes have been checked.

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/Scalar.h>
#include <c10/core/ScalarType.h>
#include <c10/core/SymInt.h>

#include <optional>

namespace attn_mask::ops {

using OptionalSymInt = std::optional<c10::SymInt>;

std::optional<at::Tensor> to_causal_4d(c10::SymInt batch_size, c10::SymInt query_length,
                                       c10::SymInt key_value_length, at::ScalarType dtype,
                                       std::optional<at::Device> device,
                                       OptionalSymInt sliding_window);

at::Tensor make_causal_mask(c10::SymIntArrayRef input_ids_shape, c10::SymInt past_key_values_length,
                            OptionalSymInt sliding_window, at::ScalarType dtype,
                            std::optional<at::Device> device);

std::optional<at::Tensor> create_4d_causal_attention_mask(c10::SymIntArrayRef input_shape,
                                                          c10::SymInt past_key_values_length,
                                                          OptionalSymInt sliding_window,
                                                          at::ScalarType dtype,
                                                          std::optional<at::Device> device);

at::Tensor to_4d(const at::Tensor& attention_mask_2d, c10::SymInt query_length,
                 at::ScalarType dtype, OptionalSymInt key_value_length, bool is_causal,
                 OptionalSymInt sliding_window);

at::Tensor expand_mask(const at::Tensor& mask, OptionalSymInt tgt_len, at::ScalarType dtype);

at::Tensor prepare_4d_attention_mask(const at::Tensor& mask, OptionalSymInt tgt_len,
                                     at::ScalarType dtype);

std::optional<at::Tensor> prepare_4d_attention_mask_for_sdpa(const at::Tensor& mask,
                                                             OptionalSymInt tgt_len,
                                                             at::ScalarType dtype, bool allow_skip);

std::optional<at::Tensor> prepare_4d_causal_attention_mask(
    const std::optional<at::Tensor>& attention_mask, c10::SymIntArrayRef input_shape,
    const at::Tensor& inputs_embeds, c10::SymInt past_key_values_length,
    OptionalSymInt sliding_window);

std::optional<at::Tensor> prepare_4d_causal_attention_mask_for_sdpa(
    const std::optional<at::Tensor>& attention_mask, c10::SymIntArrayRef input_shape,
    const at::Tensor& inputs_embeds, c10::SymInt past_key_values_length,
    OptionalSymInt sliding_window, bool allow_skip);

at::Tensor unmask_unattended(const at::Tensor& expanded_mask, const c10::Scalar& min_dtype);

/// The same with a gradient, for floating masks that need one.
at::Tensor unmask_unattended_autograd(const at::Tensor& expanded_mask,
                                      const c10::Scalar& min_dtype);

/// A host decision: with a mask to look at, it waits for the mask's device.
bool ignore_causal_mask_sdpa(const std::optional<at::Tensor>& attention_mask,
                             const at::Tensor& inputs_embeds, c10::SymInt past_key_values_length,
                             OptionalSymInt sliding_window, bool is_training);

/// Whether no element of the mask is zero; a host decision, too.
bool is_all_visible(const at::Tensor& mask);

/// Any rule (see rule_program.h) as a boolean mask.
at::Tensor boolean(c10::SymIntArrayRef rule, at::TensorList operands, c10::SymInt batch_size,
                   c10::SymInt q_length, c10::SymInt kv_length, c10::SymInt q_offset,
                   c10::SymInt kv_offset, const std::optional<at::Tensor>& q_positions,
                   const std::optional<at::Tensor>& kv_positions, std::optional<at::Device> device);

/// Any rule as an additive mask, on top of a bias where one is given.
at::Tensor additive(c10::SymIntArrayRef rule, at::TensorList operands, c10::SymInt batch_size,
                    c10::SymInt q_length, c10::SymInt kv_length, at::ScalarType dtype,
                    c10::SymInt q_offset, c10::SymInt kv_offset,
                    const std::optional<at::Tensor>& q_positions,
                    const std::optional<at::Tensor>& kv_positions,
                    const std::optional<at::Tensor>& bias, std::optional<at::Device> device);

/// The same with a gradient for the bias.
at::Tensor additive_autograd(c10::SymIntArrayRef rule, at::TensorList operands,
                             c10::SymInt batch_size, c10::SymInt q_length, c10::SymInt kv_length,
                             at::ScalarType dtype, c10::SymInt q_offset, c10::SymInt kv_offset,
                             const std::optional<at::Tensor>& q_positions,
                             const std::optional<at::Tensor>& kv_positions,
                             const std::optional<at::Tensor>& bias,
                             std::optional<at::Device> device);

}  // namespace attn_mask::ops
