#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <tuple>

#include "attention/plan.h"

namespace attn_mask {

/// What attention is calculated from: query [b, h, q, d], key [b, kv heads, kv, d], value [b, kv
/// heads, kv, dv], on one device, with their last dimension without gaps.
struct AttentionInputs {
  at::Tensor query;
  at::Tensor key;
  at::Tensor value;
  std::optional<double> scale;  // absent: 1 / sqrt(d)
};

/// The result of attention and what its backward needs: [b, h, q, dv] and the log-sum-exp of the
/// scores [b, h, q], with queries outside of heads in memory.
struct Attended {
  at::Tensor out;
  at::Tensor lse;
};

struct AttentionGradients {
  at::Tensor query;
  at::Tensor key;
  at::Tensor value;
};

/// A part of the queries, from row `first_row` on, as a problem of its own.
struct PlannedRows {
  const Problem& problem;
  const attention::Plan& plan;
  int64_t first_row;
};

/// Calls its argument for each part of the queries.
using ForEachPart = std::function<void(const std::function<void(const PlannedRows&)>&)>;

/// [b, h, length, width], with `length` outside of heads in memory, as ATen's kernels make them.
at::Tensor empty_by_length(const at::Tensor& like, c10::SymInt length, c10::SymInt width,
                           std::optional<at::ScalarType> dtype = std::nullopt);

/// [b, h, q, value width], with the strides of the query or, where their widths differ, as above.
at::Tensor empty_out(const at::Tensor& query, const at::Tensor& value);

/// The dtype of the log-sum-exp of the scores of a dtype.
at::ScalarType lse_dtype(at::ScalarType dtype);

Attended attend_in_tiles(const AttentionInputs& inputs, const ForEachPart& for_each_part);

AttentionGradients attend_in_tiles_backward(const AttentionInputs& inputs, const Attended& attended,
                                            const at::Tensor& grad_out,
                                            const ForEachPart& for_each_part);

}  // namespace attn_mask
