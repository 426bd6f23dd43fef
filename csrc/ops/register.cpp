#include "ops/register.h"

#include "ops/operators.h"

namespace attn_mask::ops {

void register_all(torch::Library& m) {
  m.impl("to_causal_4d", &to_causal_4d);
  m.impl("to_causal_4d.out", &to_causal_4d_out);
  m.impl("to_4d", &to_4d);
  m.impl("to_4d.out", &to_4d_out);
  m.impl("_make_causal_mask", &make_causal_mask);
  m.impl("_make_causal_mask.out", &make_causal_mask_out);
  m.impl("_expand_mask", &expand_mask);
  m.impl("_expand_mask.out", &expand_mask_out);
  m.impl("_unmask_unattended", &unmask_unattended);
  m.impl("_unmask_unattended.out", &unmask_unattended_out);
  m.impl("_ignore_causal_mask_sdpa", &ignore_causal_mask_sdpa);
  m.impl("_is_all_visible", &is_all_visible);
  m.impl("_prepare_4d_causal_attention_mask", &prepare_4d_causal_attention_mask);
  m.impl("_prepare_4d_causal_attention_mask.out", &prepare_4d_causal_attention_mask_out);
  m.impl("_prepare_4d_causal_attention_mask_for_sdpa", &prepare_4d_causal_attention_mask_for_sdpa);
  m.impl("_prepare_4d_causal_attention_mask_for_sdpa.out",
         &prepare_4d_causal_attention_mask_for_sdpa_out);
  m.impl("_prepare_4d_attention_mask", &prepare_4d_attention_mask);
  m.impl("_prepare_4d_attention_mask.out", &prepare_4d_attention_mask_out);
  m.impl("_prepare_4d_attention_mask_for_sdpa", &prepare_4d_attention_mask_for_sdpa);
  m.impl("_prepare_4d_attention_mask_for_sdpa.out", &prepare_4d_attention_mask_for_sdpa_out);
  m.impl("_create_4d_causal_attention_mask", &create_4d_causal_attention_mask);
  m.impl("_create_4d_causal_attention_mask.out", &create_4d_causal_attention_mask_out);
  m.impl("boolean", &boolean);
  m.impl("boolean.out", &boolean_out);
  m.impl("additive", &additive);
  m.impl("additive.out", &additive_out);
  m.impl("block_mask", &block_mask);
  m.impl("_block_states", &block_states);
  m.impl("_block_mask_widths", &block_mask_widths);
}

}  // namespace attn_mask::ops
