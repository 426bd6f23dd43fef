#pragma once

// Typed calls through the dispatcher: what the C++ API and the pybind11 module use. They go through
// every dispatch key (modes, subclasses, tracing of the graph) but skip torch.ops' parsing of
// Python arguments.

#include <ATen/core/dispatch/Dispatcher.h>

#include "ops/operators.h"

namespace attn_mask::call {

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Defines attn_mask::call::NAME with the signature of attn_mask::ops::NAME.
#define ATTN_MASK_DEFINE_CALL(NAME, SCHEMA)                                 \
  template <typename... Args>                                               \
  auto NAME(Args&&... args) {                                               \
    static const auto op = find<decltype(ops::NAME)>("attn_mask::" SCHEMA); \
    return op.call(std::forward<Args>(args)...);                            \
  }

ATTN_MASK_DEFINE_CALL(to_causal_4d, "to_causal_4d")
ATTN_MASK_DEFINE_CALL(make_causal_mask, "_make_causal_mask")
ATTN_MASK_DEFINE_CALL(to_4d, "to_4d")
ATTN_MASK_DEFINE_CALL(expand_mask, "_expand_mask")
ATTN_MASK_DEFINE_CALL(unmask_unattended, "_unmask_unattended")
ATTN_MASK_DEFINE_CALL(ignore_causal_mask_sdpa, "_ignore_causal_mask_sdpa")
ATTN_MASK_DEFINE_CALL(is_all_visible, "_is_all_visible")
ATTN_MASK_DEFINE_CALL(prepare_4d_causal_attention_mask, "_prepare_4d_causal_attention_mask")
ATTN_MASK_DEFINE_CALL(prepare_4d_causal_attention_mask_for_sdpa,
                      "_prepare_4d_causal_attention_mask_for_sdpa")
ATTN_MASK_DEFINE_CALL(prepare_4d_attention_mask, "_prepare_4d_attention_mask")
ATTN_MASK_DEFINE_CALL(prepare_4d_attention_mask_for_sdpa, "_prepare_4d_attention_mask_for_sdpa")
ATTN_MASK_DEFINE_CALL(create_4d_causal_attention_mask, "_create_4d_causal_attention_mask")
ATTN_MASK_DEFINE_CALL(boolean, "boolean")
ATTN_MASK_DEFINE_CALL(additive, "additive")
ATTN_MASK_DEFINE_CALL(block_mask, "block_mask")
ATTN_MASK_DEFINE_CALL(block_states, "_block_states")
ATTN_MASK_DEFINE_CALL(block_mask_widths, "_block_mask_widths")

#undef ATTN_MASK_DEFINE_CALL

}  // namespace attn_mask::call
