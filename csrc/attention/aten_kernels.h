#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace attn_mask {

/// Queries and keys that fit each other, none of them without elements.
struct AttentionTile {
  at::Tensor query;
  at::Tensor key;
  at::Tensor value;
  bool is_causal;                  // query i sees keys 0 to i
  std::optional<at::Tensor> mask;  // additive, [b or 1, h or 1, q, kv]
  std::optional<double> scale;
};

/// Attention of a tile: ATen's flash kernel on the CPU, else what the device has; in matrix
/// products where the width of values is not that of queries, which flash kernels do not take.
/// Returns (out, lse); both are 0 in rows without a key.
std::tuple<at::Tensor, at::Tensor> attend(const AttentionTile& tile);

/// The gradients of query, key and value; `lse` is that of `attend`.
std::tuple<at::Tensor, at::Tensor, at::Tensor> attend_backward(const AttentionTile& tile,
                                                               const at::Tensor& out,
                                                               const at::Tensor& lse,
                                                               const at::Tensor& grad_out);

}  // namespace attn_mask
