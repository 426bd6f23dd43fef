#include "encoder.h"

#include <ATen/ATen.h>
#include <attn_mask/attn_mask.h>

#include <string>

namespace example {

EncoderConfig::EncoderConfig(const Archive& config)
    : layers(config.at("layers").toInt()),
      heads(config.at("heads").toInt()),
      layer_norm_eps(config.at("layer_norm_eps").toDouble()) {}

Encoder::Encoder(const EncoderConfig& config, const Archive& weights)
    : config_(config),
      words_(weights.tensor("embeddings.word_embeddings.weight")),
      positions_(weights.tensor("embeddings.position_embeddings.weight")),
      types_(weights.tensor("embeddings.token_type_embeddings.weight")) {
  const auto parameters = [&](const std::string& name) {
    return Parameters{weights.tensor(name + ".weight"), weights.tensor(name + ".bias")};
  };
  norm_ = parameters("embeddings.LayerNorm");
  for (int64_t i = 0; i < config.layers; ++i) {
    const std::string layer = "encoder.layer." + std::to_string(i) + ".";
    layers_.push_back({.query = parameters(layer + "attention.self.query"),
                       .key = parameters(layer + "attention.self.key"),
                       .value = parameters(layer + "attention.self.value"),
                       .output = parameters(layer + "attention.output.dense"),
                       .attention_norm = parameters(layer + "attention.output.LayerNorm"),
                       .up = parameters(layer + "intermediate.dense"),
                       .down = parameters(layer + "output.dense"),
                       .mlp_norm = parameters(layer + "output.LayerNorm")});
  }
}

at::Tensor Encoder::forward(const at::Tensor& ids, const at::Tensor& padding_mask) const {
  at::Tensor states = at::embedding(words_, ids) + positions_.slice(0, 0, ids.size(1)) + types_[0];
  states = layer_norm(states, norm_);  // [b, n, hidden]
  // Shared by the layers; nothing where there is no padding.
  const auto mask =
      attn_mask::prepare_4d_attention_mask_for_sdpa(padding_mask, states.scalar_type());
  for (const Layer& layer : layers_) {
    states = layer_norm(states + attention(layer, states, mask), layer.attention_norm);
    const at::Tensor up = at::gelu(at::linear(states, layer.up.weight, layer.up.bias));
    const at::Tensor down = at::linear(up, layer.down.weight, layer.down.bias);
    states = layer_norm(states + down, layer.mlp_norm);
  }
  return states;
}

at::Tensor Encoder::attention(const Layer& layer, const at::Tensor& states,
                              const std::optional<at::Tensor>& mask) const {
  const auto heads_of = [&](const Parameters& projection) {
    return at::linear(states, projection.weight, projection.bias)
        .unflatten(-1, {config_.heads, -1})
        .transpose(1, 2);  // [b, heads, n, head_dim]
  };
  const at::Tensor attended = at::scaled_dot_product_attention(
      heads_of(layer.query), heads_of(layer.key), heads_of(layer.value), mask);
  return at::linear(attended.transpose(1, 2).flatten(2), layer.output.weight, layer.output.bias);
}

at::Tensor Encoder::layer_norm(const at::Tensor& states, const Parameters& norm) const {
  return at::layer_norm(states, norm.weight.sizes(), norm.weight, norm.bias,
                        config_.layer_norm_eps);
}

at::Tensor mean_of_tokens(const at::Tensor& states, const at::Tensor& padding_mask) {
  const at::Tensor counted = padding_mask.unsqueeze(-1).to(states.scalar_type());
  const at::Tensor mean = (states * counted).sum(1) / counted.sum(1);
  return mean / mean.norm(2, -1, /*keepdim=*/true);
}

}  // namespace example
