#pragma once

/// Attention by a rule, without a mask of all queries and keys:
///
///     using namespace attn_mask;
///     at::Tensor out =
///         scaled_dot_product_attention(query, key, value, causal() & sliding_window(1024)).out;
///
/// It mirrors `attn_mask.scaled_dot_product_attention` of the Python package. Both results can be
/// differentiated (once). Any number of threads may call it at once.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "attn_mask/export.h"
#include "attn_mask/rules.h"

namespace attn_mask {

/// The options of `scaled_dot_product_attention`, in this order: `{.scale = 0.125}`.
struct AttentionOptions {
  /// What scores are multiplied by; absent: 1 / sqrt(head size).
  std::optional<double> scale = std::nullopt;
  /// Whether several heads of the query share one of the key.
  bool enable_gqa = false;
  /// The position of the first query; absent: where the last query and the last key are the same
  /// token.
  std::optional<int64_t> q_offset = std::nullopt;
  /// The position of the first key.
  int64_t kv_offset = 0;
  /// Integers: one more offset, or the position of each; see AdditiveOptions.
  std::optional<at::Tensor> q_positions = std::nullopt;
  std::optional<at::Tensor> kv_positions = std::nullopt;
  /// How many documents all batch rows have at most, each a run of one id, and how long one is at
  /// most: on GPUs, documents then take the fastest kernel.
  std::optional<int64_t> max_documents = std::nullopt;
  std::optional<int64_t> max_length = std::nullopt;
};

/// The result [b, h, q, width of value], and the natural logarithm of the sum of the exponentials
/// of the scores [b, h, q]: 0 and -inf for queries that attend to no key.
struct Attention {
  at::Tensor out;
  at::Tensor log_sum_exp;
};

/// `query` [b, h, q, d], `key` [b, h, kv, d] and `value` [b, h, kv, width], of kHalf, kBFloat16,
/// kFloat or kDouble; with enable_gqa, key and value have a number of heads that divides h.
///
/// Throws c10::ValueError (shapes, devices that differ), c10::TypeError (dtypes, undefined
/// tensors), c10::NotImplementedError (devices, second derivatives).
ATTN_MASK_API Attention scaled_dot_product_attention(const at::Tensor& query, const at::Tensor& key,
                                                     const at::Tensor& value, const MaskRule& rule,
                                                     const AttentionOptions& options = {});

}  // namespace attn_mask
