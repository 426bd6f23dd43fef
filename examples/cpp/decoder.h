#pragma once

/// A decoder-only language model of the Llama family (Llama, Mistral): token embedding, layers of
/// RMSNorm, rotary grouped-query attention and a gated MLP, a linear head.
///
/// Sizes: b batch rows, q tokens given to this call, kv tokens seen so far (those of the cache and
/// these).

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "archive.h"

namespace example {

struct DecoderConfig {
  explicit DecoderConfig(const Archive& config);

  int64_t layers;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;
  double rms_norm_eps;
  double rope_theta;
  /// The keys that a query attends to, its own among them.
  std::optional<int64_t> sliding_window;
};

/// The keys and values of the tokens seen so far, per layer: [b, kv_heads, kv, head_dim].
struct KeyValueCache {
  struct Layer {
    at::Tensor keys, values;
  };

  int64_t length = 0;
  std::vector<Layer> layers;
};

class Decoder {
 public:
  /// Weights by their names in transformers' state_dict().
  Decoder(const DecoderConfig& config, const Archive& weights);

  /// Logits [b, q, vocabulary] of the token ids [b, q], at positions [b, q]; they come after those
  /// in the cache, which grows by them. The padding mask [b, kv] holds 0 where there is no token.
  at::Tensor forward(const at::Tensor& ids, const at::Tensor& positions,
                     const at::Tensor& padding_mask, KeyValueCache& cache) const;

 private:
  struct Layer {
    at::Tensor attention_norm, query, key, value, output;
    at::Tensor mlp_norm, gate, up, down;
  };

  at::Tensor attention(const Layer& layer, const at::Tensor& states, const at::Tensor& cos,
                       const at::Tensor& sin, const std::optional<at::Tensor>& mask,
                       KeyValueCache::Layer& cache) const;
  at::Tensor rms_norm(const at::Tensor& states, const at::Tensor& weight) const;

  DecoderConfig config_;
  at::Tensor embedding_, norm_, head_;
  std::vector<Layer> layers_;
};

struct Generated {
  at::Tensor tokens;  // [b, new]
  at::Tensor logits;  // [b, new, vocabulary], by which each token was chosen
};

/// Greedy decoding of `new_tokens` tokens after left-padded prompts: arguments as in
/// Decoder::forward.
Generated generate(const Decoder& decoder, at::Tensor ids, at::Tensor positions,
                   at::Tensor padding_mask, int64_t new_tokens);

}  // namespace example
