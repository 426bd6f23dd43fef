#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <vector>

#include "attention/tiles.h"
#include "rule/problem.h"

namespace attn_mask {

/// What a rule is for the flash kernels of CUDA devices: a window around the query's position, and
/// whether it ends with documents.
struct FlashRule {
  int64_t left;                   // -1: open
  int64_t right;                  // -1: open
  std::optional<at::Tensor> ids;  // of documents, [b or 1, n]
};

/// How many documents there are at most, of all batch rows, and how long.
struct DocumentLimits {
  int64_t documents;
  int64_t length;
};

/// Launches what finds documents of ids [rows or 1, n], n > 0, in `rows` rows. `borders`: int32
/// [limits.documents + 1], or null; see DocumentParams. Returns FoundDocuments, int64 [4] on the
/// device.
at::Tensor find_documents(const at::Tensor& ids, int64_t rows, const DocumentLimits& limits,
                          int32_t* borders);

/// Nothing where those kernels can't say all of a rule (attention/flash.h).
std::optional<FlashRule> flash_rule(const Problem& problem, at::TensorList operands);

/// Whether the device has flash kernels for these inputs, and torch is allowed to use them.
bool has_flash(const AttentionInputs& inputs);

/// One call for all queries. The host reads nothing: where ids have more documents than `limits`
/// say, or longer ones, the device reports an error.
Attended attend_by_flash(const AttentionInputs& inputs, const FlashRule& rule,
                         std::optional<DocumentLimits> limits);

AttentionGradients attend_by_flash_backward(const AttentionInputs& inputs, const FlashRule& rule,
                                            std::optional<DocumentLimits> limits,
                                            const Attended& attended, const at::Tensor& grad_out);

}  // namespace attn_mask
