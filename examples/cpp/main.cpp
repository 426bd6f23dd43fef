/// demo FOLDER [--without padding|window]
///
/// Runs the models that export_models.py wrote to FOLDER, under masks of attn_mask, and compares
/// with what transformers made of the same inputs. Exit status: 0 all equal, 1 not, 2 an error.
/// --without leaves a part out of every mask, so that the comparisons fail.

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "archive.h"
#include "decoder.h"
#include "encoder.h"

namespace example {
namespace {

/// Largest absolute differences from transformers: of logits, which go up to about 6, and of
/// embeddings, which are unit vectors.
constexpr double kLogitsTolerance = 1e-4;
constexpr double kEmbeddingsTolerance = 1e-6;
/// What a mask without its padding or window must change for the comparisons to mean anything.
constexpr double kLeastEffect = 1e-2;

/// Prompts are also given to the decoders this many tokens at a time.
constexpr int64_t kPiece = 4;

/// What goes into the masks.
struct Parts {
  bool padding = true;
  bool window = true;
};

class Report {
 public:
  void check(bool passed, const std::string& text) {
    std::printf("  %s  %s\n", passed ? "ok  " : "FAIL", text.c_str());
    failures_ += !passed;
  }

  void within(double difference, double tolerance, const std::string& what) {
    check(difference <= tolerance,  // not so for a NaN
          what + " off by " + number(difference) + " (tolerance " + number(tolerance) + ")");
  }

  /// The comparison with `what` would notice if `part` were missing from the mask.
  void effect(double difference, const std::string& part, const std::string& what) {
    check(difference >= kLeastEffect,
          "a mask without the " + part + ": " + what + " off by " + number(difference));
  }

  int failures() const { return failures_; }

 private:
  static std::string number(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%.2g", value);
    return text;
  }

  int failures_ = 0;
};

/// The largest absolute difference between [b, n, ...], where the padding mask [b, n] has tokens.
double difference(const at::Tensor& found, const at::Tensor& expected,
                  const at::Tensor& padding_mask) {
  TORCH_CHECK(found.sizes() == expected.sizes(), "sizes ", found.sizes(), " and ",
              expected.sizes());
  const at::Tensor differences = (found - expected).abs().amax(-1);
  return at::where(padding_mask == 1, differences, at::zeros_like(differences))
      .max()
      .item<double>();
}

double difference(const at::Tensor& found, const at::Tensor& expected) {
  return (found - expected).abs().max().item<double>();
}

/// Where each token stands in its row, padding not counted.
at::Tensor positions_of(const at::Tensor& padding_mask) {
  return (padding_mask.cumsum(-1) - 1).clamp_min(0);
}

/// Logits [b, q, vocabulary] of prompts, given to the model `piece` tokens at a time.
at::Tensor prefill(const Decoder& decoder, const at::Tensor& ids, const at::Tensor& positions,
                   const at::Tensor& padding_mask, int64_t piece) {
  KeyValueCache cache;
  std::vector<at::Tensor> logits;
  for (int64_t begin = 0; begin < ids.size(1); begin += piece) {
    const int64_t end = std::min(begin + piece, ids.size(1));
    logits.push_back(decoder.forward(ids.slice(1, begin, end), positions.slice(1, begin, end),
                                     padding_mask.slice(1, 0, end), cache));
  }
  return at::cat(logits, 1);
}

void print_tokens(const at::Tensor& ids, const at::Tensor& padding_mask,
                  const at::Tensor& new_tokens) {
  const auto print_row = [](const at::Tensor& row) {
    for (int64_t i = 0; i < row.size(0); ++i) {
      std::printf(" %3d", row[i].item<int>());
    }
  };
  for (int64_t row = 0; row < ids.size(0); ++row) {
    const int64_t padding = ids.size(1) - padding_mask[row].sum().item<int64_t>();
    std::printf("  %s", std::string(4 * padding, ' ').c_str());
    print_row(ids[row].slice(0, padding));
    std::printf("  >>");
    print_row(new_tokens[row]);
    std::printf("\n");
  }
}

void run_decoder(const char* name, const Archive& archive, const Parts& parts, Report& report) {
  const DecoderConfig config(archive.dict("config"));
  DecoderConfig without_window = config;
  without_window.sliding_window.reset();
  const Archive weights = archive.dict("weights");
  const Decoder decoder(parts.window ? config : without_window, weights);

  for (const c10::IValue& item : archive.at("batches").toListRef()) {
    const Archive batch(item);
    const at::Tensor ids = batch.tensor("ids");
    const at::Tensor padding_mask = batch.tensor("attention_mask");
    const at::Tensor positions = positions_of(padding_mask);
    const at::Tensor no_padding = at::ones_like(padding_mask);
    const at::Tensor mask = parts.padding ? padding_mask : no_padding;
    const at::Tensor expected_tokens = batch.tensor("new_tokens");
    const at::Tensor expected_logits = batch.tensor("prefill_logits");
    const int64_t length = ids.size(1), new_tokens = expected_tokens.size(1);

    std::printf("%s, %s\n", name, batch.at("name").toStringRef().c_str());
    const Generated generated = generate(decoder, ids, positions, mask, new_tokens);
    print_tokens(ids, padding_mask, generated.tokens);
    report.check(at::equal(generated.tokens, expected_tokens), "tokens equal transformers'");
    report.within(difference(generated.logits, batch.tensor("new_logits")), kLogitsTolerance,
                  "logits of each step");
    const auto off = [&](const Decoder& model, const at::Tensor& attended, int64_t piece) {
      return difference(prefill(model, ids, positions, attended, piece), expected_logits,
                        padding_mask);
    };
    report.within(off(decoder, mask, length), kLogitsTolerance, "logits of the prompts");
    report.within(off(decoder, mask, kPiece), kLogitsTolerance,
                  "logits of the prompts in pieces of " + std::to_string(kPiece));
    if (!at::equal(padding_mask, no_padding)) {
      report.effect(off(decoder, no_padding, length), "padding", "logits");
    }
    if (config.sliding_window) {
      report.effect(off(Decoder(without_window, weights), mask, length), "window", "logits");
    }
  }
}

void run_encoder(const Archive& archive, const Parts& parts, Report& report) {
  const Encoder encoder(EncoderConfig(archive.dict("config")), archive.dict("weights"));
  std::vector<at::Tensor> embeddings;
  for (const char* name : {"sentences", "query"}) {
    const Archive batch = archive.dict(name);
    const at::Tensor padding_mask = batch.tensor("attention_mask");
    const at::Tensor no_padding = at::ones_like(padding_mask);
    const auto embed = [&](const at::Tensor& attended) {
      return mean_of_tokens(encoder.forward(batch.tensor("ids"), attended), padding_mask);
    };

    std::printf("all-MiniLM-L6-v2, %s\n", name);
    embeddings.push_back(embed(parts.padding ? padding_mask : no_padding));
    const at::Tensor expected = batch.tensor("embeddings");
    report.within(difference(embeddings.back(), expected), kEmbeddingsTolerance, "embeddings");
    if (!at::equal(padding_mask, no_padding)) {
      report.effect(difference(embed(no_padding), expected), "padding", "embeddings");
    }
  }

  const auto texts = [&](const char* name) { return archive.dict(name).at("texts").toListRef(); };
  const at::Tensor similarities = at::mv(embeddings[0], embeddings[1][0]);
  std::printf("  %s\n", texts("query")[0].toStringRef().c_str());
  for (int64_t i = 0; i < similarities.size(0); ++i) {
    std::printf("  %5.2f  %s\n", similarities[i].item<double>(),
                texts("sentences")[i].toStringRef().c_str());
  }
}

int run(const std::string& folder, const Parts& parts) {
  const c10::InferenceMode guard;
  Report report;
  run_decoder("Llama", Archive::read(folder + "/llama.pt"), parts, report);
  run_decoder("Mistral", Archive::read(folder + "/mistral.pt"), parts, report);
  run_encoder(Archive::read(folder + "/minilm.pt"), parts, report);
  if (report.failures() == 0) return 0;
  std::printf("%d comparisons failed\n", report.failures());
  return 1;
}

}  // namespace
}  // namespace example

int main(int argc, char** argv) {
  example::Parts parts;
  if (argc == 4 && std::string(argv[2]) == "--without") {
    parts.padding = std::string(argv[3]) != "padding";
    parts.window = std::string(argv[3]) != "window";
  }
  const bool leaves_out = !parts.padding || !parts.window;
  if (argc != 2 && !leaves_out) {
    std::fprintf(stderr, "usage: %s FOLDER [--without padding|window]\n", argv[0]);
    return 2;
  }
  try {
    return example::run(argv[1], parts);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
