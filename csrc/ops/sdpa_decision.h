#pragma once

// What scaled_dot_product_attention is given as a mask: the one place where operators and the C++
// API decide it. Graphs are recorded from Python and see nothing of C++: for them the
// same stands in attn_mask/_sdpa_decision.py, and tests hold the two together.

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/SymInt.h>

#include <algorithm>
#include <array>
#include <optional>

namespace attn_mask {

/// Where attention gives NaN for rows without a key, so that upstream unmasks them:
/// memory-efficient attention on CUDA and XPU does.
inline constexpr std::array kUnmaskedDevices{at::kCUDA, at::kXPU};

/// Whether rows of a mask without a key are unmasked: by the caller's argument, else by its device.
inline bool is_unmasked(const at::Tensor& mask, std::optional<bool> unmask_unattended) {
  return unmask_unattended.value_or(std::ranges::find(kUnmaskedDevices, mask.device().type()) !=
                                    kUnmaskedDevices.end());
}

/// A 4-D mask is the result as it is, but for rows that are unmasked.
inline bool is_result(const std::optional<at::Tensor>& mask,
                      std::optional<bool> unmask_unattended) {
  return mask && mask->dim() == 4 && !is_unmasked(*mask, unmask_unattended);
}

/// One query without a window attends to every key, which needs no mask.
bool needs_causal_mask(const c10::SymInt& q_length,
                       const std::optional<c10::SymInt>& sliding_window);

/// Whether the argument `is_causal` (or there being one query) replaces the mask.
/// `inputs_embeds` is [batch_size, query_length, ...]. Where shapes allow it, a 2-D mask is
/// read, for which the host waits for its device.
bool is_causal_enough(const char* op, const std::optional<at::Tensor>& attention_mask,
                      const at::Tensor& inputs_embeds, const c10::SymInt& past_key_values_length,
                      const std::optional<c10::SymInt>& sliding_window);

/// Whether every element equals 1, whatever the device; reads the mask on the host.
bool is_all_ones(const char* op, const char* argument, const at::Tensor& mask);

}  // namespace attn_mask
