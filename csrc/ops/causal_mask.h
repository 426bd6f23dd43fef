#pragma once

#include "ops/core/operators.h"
#include "ops/core/output.h"

namespace attn_mask::ops {

/// The additive mask of causality (and window) alone. Of a new tensor one plane is written, and the
/// batch is a stride-0 expand of it, as upstream's.
at::Tensor causal_mask(const Output& output, const c10::SymInt& batch_size,
                       const c10::SymInt& q_length, const c10::SymInt& kv_length,
                       at::ScalarType dtype, std::optional<at::Device> device,
                       const OptionalSymInt& sliding_window);

/// The same, and nothing where none is needed. A mask of the caller's is written whole, as it has
/// no way to say so.
std::optional<at::Tensor> causal_mask_if_needed(const Output& output, const c10::SymInt& batch_size,
                                                const c10::SymInt& q_length,
                                                const c10::SymInt& kv_length, at::ScalarType dtype,
                                                std::optional<at::Device> device,
                                                const OptionalSymInt& sliding_window);

}  // namespace attn_mask::ops
