#pragma once

#include "rule/levels/hull.h"
#include "rule/levels/spans.h"
#include "rule/problem.h"

namespace attn_mask::ATTN_MASK_ISA {

/// Finds the spans of rows; most rules need no more than their hull, which is cheaper.
class RowSpanFinder {
 public:
  explicit RowSpanFinder(const Problem& params)
      : params_(params),
        hull_(params.rule),
        hull_is_all_(hull_.is_all && !params.kv_positions.listed) {}

  RowSpans operator()(const Query& query) const {
    if (!hull_is_all_) {
      return row_spans(params_.rule, query, params_.kv_positions, params_.kv_length);
    }
    const Interval columns = hull(query, known(query.batch, {0, params_.kv_length}));
    RowSpans row{};
    if (!columns.empty()) {
      row.spans.at[row.spans.size++] = columns;
      row.unresolved = hull_.unresolved;
    }
    return row;
  }

  /// Whether rows are their hull, or that and one padding leaf.
  bool is_simple() const { return hull_is_all_ && (hull_.unresolved == 0 || padding() != nullptr); }

  /// The only leaf that has yet to be evaluated within hulls, if it is padding.
  int32_t padding_node() const {
    const uint32_t nodes = hull_.unresolved;
    const int32_t node = nodes == 0 ? -1 : __builtin_ctz(nodes);
    const bool is_only = node >= 0 && (nodes & (nodes - 1)) == 0;
    return is_only && params_.rule.nodes[node].kind == Rule::Kind::kPadding ? node : -1;
  }
  const Padding* padding() const {
    return padding_node() < 0 ? nullptr : &params_.rule.nodes[padding_node()].padding;
  }

  /// The columns of a row's hull, where `known` is that of its batch row.
  Interval hull(const Query& query, Interval known) const {
    const int64_t shift = params_.kv_positions.at(query.batch, 0);
    const Interval near = hull_.chunk < 0 ? hull_.band(query) : in_chunk(query);
    return intersect({near.begin - shift, near.end - shift}, known);
  }

  /// Among some columns, those in which the hulls of a batch row's rows lie.
  Interval known(int64_t batch, Interval columns) const {
    const int64_t shift = params_.kv_positions.at(batch, 0);
    return intersect({hull_.known.begin - shift, hull_.known.end - shift}, columns);
  }

 private:
  /// Out of line: it would slow down the rows of other rules.
  __attribute__((noinline)) Interval in_chunk(const Query& query) const {
    return hull_.near(params_.rule, query);
  }

  const Problem& params_;
  Hull hull_;
  bool hull_is_all_;
};

}  // namespace attn_mask::ATTN_MASK_ISA
