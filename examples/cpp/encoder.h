#pragma once

/// A sentence encoder: BERT, its token vectors averaged (all-MiniLM-L6-v2).
///
/// Sizes: b sentences, n tokens of the longest one.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "archive.h"

namespace example {

struct EncoderConfig {
  explicit EncoderConfig(const Archive& config);

  int64_t layers;
  int64_t heads;
  double layer_norm_eps;
};

class Encoder {
 public:
  /// Weights by their names in transformers' state_dict().
  Encoder(const EncoderConfig& config, const Archive& weights);

  /// States [b, n, hidden] of the token ids [b, n]. The padding mask [b, n] holds 0 where there is
  /// no token.
  at::Tensor forward(const at::Tensor& ids, const at::Tensor& padding_mask) const;

 private:
  struct Parameters {
    at::Tensor weight, bias;
  };
  struct Layer {
    Parameters query, key, value, output, attention_norm;
    Parameters up, down, mlp_norm;
  };

  at::Tensor attention(const Layer& layer, const at::Tensor& states,
                       const std::optional<at::Tensor>& mask) const;
  at::Tensor layer_norm(const at::Tensor& states, const Parameters& norm) const;

  EncoderConfig config_;
  at::Tensor words_, positions_, types_;
  Parameters norm_;
  std::vector<Layer> layers_;
};

/// Unit vectors [b, hidden]: the mean of the states [b, n, hidden] of each sentence's tokens.
at::Tensor mean_of_tokens(const at::Tensor& states, const at::Tensor& padding_mask);

}  // namespace example
