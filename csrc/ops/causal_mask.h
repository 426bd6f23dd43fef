#pragma once

#include "ops/operators.h"
#include "ops/output.h"

namespace attn_mask::ops {

/// One query without a window attends to every key, which needs no mask.
bool needs_causal_mask(const c10::SymInt& q_length, const OptionalSymInt& sliding_window);

/// The additive mask of causality (and window) alone. Of a new tensor one plane is written, and the
/// batch is a stride-0 expand of it, as upstream's.
at::Tensor causal_mask(const char* op, const c10::SymInt& batch_size, const c10::SymInt& q_length,
                       const c10::SymInt& kv_length, at::ScalarType dtype,
                       std::optional<at::Device> device, const OptionalSymInt& sliding_window,
                       const Output& output);

}  // namespace attn_mask::ops
