#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>

#include "ops/core/output.h"

namespace attn_mask {

/// What else than padding masks: causality with a window, where `is_causal`.
struct OfQueries {
  c10::SymInt q_length;
  std::optional<c10::SymInt> kv_length;
  bool is_causal;
  std::optional<c10::SymInt> sliding_window;
};

/// The additive mask of a 2D padding mask, and of causality: what to_4d and its relatives share.
/// `argument` names the caller's in errors. With `unmask_unattended`, rows in which no key is
/// visible become -0.0, as _unmask_unattended leaves them.
at::Tensor padding_mask_4d(const Output& output, const char* argument, const at::Tensor& mask,
                           const OfQueries& queries, at::ScalarType dtype, bool unmask_unattended);

}  // namespace attn_mask
