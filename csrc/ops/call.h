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

// Names here and as operators.
#define ATTN_MASK_FOR_EACH_CALL(DO)                                                           \
  DO(to_causal_4d, "to_causal_4d")                                                            \
  DO(make_causal_mask, "_make_causal_mask")                                                   \
  DO(to_4d, "to_4d")                                                                          \
  DO(expand_mask, "_expand_mask")                                                             \
  DO(unmask_unattended, "_unmask_unattended")                                                 \
  DO(ignore_causal_mask_sdpa, "_ignore_causal_mask_sdpa")                                     \
  DO(is_all_visible, "_is_all_visible")                                                       \
  DO(prepare_4d_causal_attention_mask, "_prepare_4d_causal_attention_mask")                   \
  DO(prepare_4d_causal_attention_mask_for_sdpa, "_prepare_4d_causal_attention_mask_for_sdpa") \
  DO(prepare_4d_attention_mask, "_prepare_4d_attention_mask")                                 \
  DO(prepare_4d_attention_mask_for_sdpa, "_prepare_4d_attention_mask_for_sdpa")               \
  DO(create_4d_causal_attention_mask, "_create_4d_causal_attention_mask")                     \
  DO(boolean, "boolean")                                                                      \
  DO(additive, "additive")                                                                    \
  DO(block_mask, "block_mask")                                                                \
  DO(block_states, "_block_states")                                                           \
  DO(block_mask_widths, "_block_mask_widths")

// Defines attn_mask::call::NAME with the signature of attn_mask::ops::NAME.
#define ATTN_MASK_DEFINE_CALL(NAME, SCHEMA)                                 \
  template <typename... Args>                                               \
  auto NAME(Args&&... args) {                                               \
    static const auto op = find<decltype(ops::NAME)>("attn_mask::" SCHEMA); \
    return op.call(std::forward<Args>(args)...);                            \
  }

ATTN_MASK_FOR_EACH_CALL(ATTN_MASK_DEFINE_CALL)

#undef ATTN_MASK_DEFINE_CALL

/// Throws c10::Error unless the operators of this process have the signatures that are called here:
/// they may come from a library of another version.
inline void check_operators() {
#define ATTN_MASK_FIND(NAME, SCHEMA) find<decltype(ops::NAME)>("attn_mask::" SCHEMA);
  ATTN_MASK_FOR_EACH_CALL(ATTN_MASK_FIND)
#undef ATTN_MASK_FIND
}

#undef ATTN_MASK_FOR_EACH_CALL

}  // namespace attn_mask::call
