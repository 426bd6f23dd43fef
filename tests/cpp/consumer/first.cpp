#include <ATen/ATen.h>
#include <attn_mask/attn_mask.h>

#include <iostream>

int main() {
  using namespace attn_mask;

  // Two prompts of three and five tokens, padded at the left.
  const at::Tensor tokens = at::tensor({0, 0, 1, 1, 1, 1, 1, 1, 1, 1}, at::kLong).view({2, 5});

  // A token attends to itself and to the one before it, but not to padding.
  const MaskRule rule = causal() & sliding_window(2) & padding(tokens);
  std::cout << boolean(rule, /*batch_size=*/2, /*q_length=*/5, /*kv_length=*/5)[0][0].to(at::kInt)
            << '\n';

  // The same as scaled_dot_product_attention adds it.
  const at::Tensor heads = at::zeros({2, 4, 5, 8}, at::kHalf);
  const at::Tensor bias = additive(rule, 2, 5, 5, {.dtype = heads.scalar_type()});
  std::cout << at::scaled_dot_product_attention(heads, heads, heads, bias).sizes() << '\n';

  // The functions of transformers: no mask is needed where is_causal will do.
  const auto mask = prepare_4d_causal_attention_mask_for_sdpa(
      at::ones({2, 5}), {2, 5}, heads.view({2, 5, 32}), /*past_key_values_length=*/0);
  std::cout << (mask ? "a mask" : "is_causal") << '\n';
}
