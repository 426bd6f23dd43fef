#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace attn_mask {

/// Attention of a tile: ATen's flash kernel on the CPU, else what the device has; in matrix
/// products where the width of values is not that of queries, which flash kernels do not take.
/// Arguments that fit each other, with keys and queries; `mask`: additive, [b or 1, h or 1, q, kv];
/// `is_causal`: query i sees keys 0 to i. Returns (out, lse); both are 0 in rows without a key.
std::tuple<at::Tensor, at::Tensor> attend(const at::Tensor& query, const at::Tensor& key,
                                          const at::Tensor& value, bool is_causal,
                                          const std::optional<at::Tensor>& mask,
                                          std::optional<double> scale);

/// The gradients of query, key and value; `lse` is that of `attend`.
std::tuple<at::Tensor, at::Tensor, at::Tensor> attend_backward(
    const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const at::Tensor& out, const at::Tensor& lse, bool is_causal,
    const std::optional<at::Tensor>& mask, std::optional<double> scale);

}  // namespace attn_mask
