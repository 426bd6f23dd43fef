#include "decoder.h"

#include <ATen/ATen.h>
#include <attn_mask/attn_mask.h>

#include <string>

namespace example {

DecoderConfig::DecoderConfig(const Archive& config)
    : layers(config.at("layers").toInt()),
      heads(config.at("heads").toInt()),
      kv_heads(config.at("kv_heads").toInt()),
      head_dim(config.at("head_dim").toInt()),
      rms_norm_eps(config.at("rms_norm_eps").toDouble()),
      rope_theta(config.at("rope_theta").toDouble()),
      sliding_window(config.at("sliding_window").toOptional<int64_t>()) {}

Decoder::Decoder(const DecoderConfig& config, const Archive& weights)
    : config_(config),
      embedding_(weights.tensor("model.embed_tokens.weight")),
      norm_(weights.tensor("model.norm.weight")),
      head_(weights.tensor("lm_head.weight")) {
  for (int64_t i = 0; i < config.layers; ++i) {
    const auto weight = [&](const std::string& name) {
      return weights.tensor("model.layers." + std::to_string(i) + "." + name + ".weight");
    };
    layers_.push_back({.attention_norm = weight("input_layernorm"),
                       .query = weight("self_attn.q_proj"),
                       .key = weight("self_attn.k_proj"),
                       .value = weight("self_attn.v_proj"),
                       .output = weight("self_attn.o_proj"),
                       .mlp_norm = weight("post_attention_layernorm"),
                       .gate = weight("mlp.gate_proj"),
                       .up = weight("mlp.up_proj"),
                       .down = weight("mlp.down_proj")});
  }
}

namespace {

/// Rotates [b, heads, q, head_dim] by the angles whose cos and sin are [b, 1, q, head_dim]; element
/// i is paired with element i + head_dim / 2.
at::Tensor rotate(const at::Tensor& states, const at::Tensor& cos, const at::Tensor& sin) {
  const auto halves = states.chunk(2, -1);
  return states * cos + at::cat({-halves[1], halves[0]}, -1) * sin;
}

/// [b, q, heads * head_dim] to [b, heads, q, head_dim].
at::Tensor split_heads(const at::Tensor& states, int64_t heads) {
  return states.unflatten(-1, {heads, -1}).transpose(1, 2);
}

}  // namespace

at::Tensor Decoder::forward(const at::Tensor& ids, const at::Tensor& positions,
                            const at::Tensor& padding_mask, KeyValueCache& cache) const {
  at::Tensor states = at::embedding(embedding_, ids);  // [b, q, hidden]

  // Shared by the layers; nothing where sdpa's is_causal will do. A window of attn_mask's does not
  // count the query's own key.
  std::optional<int64_t> keys_before;
  if (config_.sliding_window) keys_before = *config_.sliding_window - 1;
  const auto mask = attn_mask::prepare_4d_causal_attention_mask_for_sdpa(
      padding_mask, ids.sizes(), states, cache.length, keys_before);

  const at::Tensor exponents = at::arange(0, config_.head_dim, 2, states.options());
  const at::Tensor frequencies = at::pow(config_.rope_theta, -exponents / config_.head_dim);
  const at::Tensor angles = (positions.unsqueeze(-1) * frequencies).repeat({1, 1, 2}).unsqueeze(1);
  const at::Tensor cos = angles.cos(), sin = angles.sin();  // [b, 1, q, head_dim]

  cache.layers.resize(layers_.size());
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    states = states + attention(layer, rms_norm(states, layer.attention_norm), cos, sin, mask,
                                cache.layers[i]);
    const at::Tensor normed = rms_norm(states, layer.mlp_norm);
    const at::Tensor gated =
        at::silu(at::linear(normed, layer.gate)) * at::linear(normed, layer.up);
    states = states + at::linear(gated, layer.down);
  }
  cache.length += ids.size(1);
  return at::linear(rms_norm(states, norm_), head_);
}

at::Tensor Decoder::attention(const Layer& layer, const at::Tensor& states, const at::Tensor& cos,
                              const at::Tensor& sin, const std::optional<at::Tensor>& mask,
                              KeyValueCache::Layer& cache) const {
  const at::Tensor query = rotate(split_heads(at::linear(states, layer.query), config_.heads), cos,
                                  sin);  // [b, heads, q, d]
  at::Tensor keys = rotate(split_heads(at::linear(states, layer.key), config_.kv_heads), cos, sin);
  at::Tensor values = split_heads(at::linear(states, layer.value), config_.kv_heads);
  if (cache.keys.defined()) {
    keys = at::cat({cache.keys, keys}, 2);
    values = at::cat({cache.values, values}, 2);
  }
  cache = {keys, values};

  // One query attends to every key; more of them without a mask have no cache before them.
  const bool is_causal = !mask && query.size(2) > 1;
  const at::Tensor attended =
      at::scaled_dot_product_attention(query, keys, values, mask, /*dropout_p=*/0.0, is_causal,
                                       /*scale=*/std::nullopt, /*enable_gqa=*/true);
  return at::linear(attended.transpose(1, 2).flatten(2), layer.output);
}

at::Tensor Decoder::rms_norm(const at::Tensor& states, const at::Tensor& weight) const {
  return at::rms_norm(states, weight.sizes(), weight, config_.rms_norm_eps);
}

Generated generate(const Decoder& decoder, at::Tensor ids, at::Tensor positions,
                   at::Tensor padding_mask, int64_t new_tokens) {
  KeyValueCache cache;
  std::vector<at::Tensor> tokens, logits;
  const at::Tensor one = padding_mask.new_ones({padding_mask.size(0), 1});
  for (int64_t step = 0; step < new_tokens; ++step) {
    logits.push_back(decoder.forward(ids, positions, padding_mask, cache).select(1, -1));
    ids = logits.back().argmax(-1, /*keepdim=*/true);
    tokens.push_back(ids);
    positions = positions.slice(1, -1) + 1;
    padding_mask = at::cat({padding_mask, one}, 1);
  }
  return {at::cat(tokens, 1), at::stack(logits, 1)};
}

}  // namespace example
