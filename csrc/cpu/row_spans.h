#pragma once

#include "format/question.h"
#include "rule/hull.h"
#include "rule/spans.h"

namespace attn_mask::ATTN_MASK_ISA {

/// Finds the spans of rows; most rules need no more than their hull, which is cheaper.
class RowSpanFinder {
 public:
  explicit RowSpanFinder(const Question& task)
      : task_(task), hull_(task.rule), hull_is_all_(hull_.is_all && !task.kv_positions.listed) {}

  RowSpans operator()(const Query& query) const {
    if (!hull_is_all_) {
      return row_spans(task_.rule, query, task_.kv_positions, task_.kv_length);
    }
    const Interval columns = hull(query);
    RowSpans row{};
    if (!columns.empty()) {
      row.spans.at[row.spans.size++] = columns;
      row.unresolved = hull_.unresolved;
    }
    return row;
  }

  /// Whether rows are their hull, and within it what one padding leaf or none says.
  bool is_simple() const { return hull_is_all_ && (hull_.unresolved == 0 || padding() != nullptr); }

  /// The only leaf that has yet to be evaluated within hulls, if it is padding.
  int32_t padding_node() const {
    const uint32_t nodes = hull_.unresolved;
    const int32_t node = nodes == 0 ? -1 : __builtin_ctz(nodes);
    const bool is_only = node >= 0 && (nodes & (nodes - 1)) == 0;
    return is_only && task_.rule.nodes[node].kind == Rule::Kind::kPadding ? node : -1;
  }
  const Padding* padding() const {
    return padding_node() < 0 ? nullptr : &task_.rule.nodes[padding_node()].padding;
  }

  /// The columns of a row's hull.
  Interval hull(const Query& query) const {
    const int64_t shift = task_.kv_positions.at(query.batch, 0);
    const Interval keys = hull_.keys(task_.rule, query);
    return intersect({keys.begin - shift, keys.end - shift}, {0, task_.kv_length});
  }

 private:
  const Question& task_;
  Hull hull_;
  bool hull_is_all_;
};

}  // namespace attn_mask::ATTN_MASK_ISA
