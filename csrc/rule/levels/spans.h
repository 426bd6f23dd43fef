#pragma once

#include "rule/rule.h"

namespace attn_mask {

/// Columns as sorted, disjoint intervals that don't touch.
struct Spans {
  static constexpr int32_t kMax = 4;

  Interval at[kMax];
  int32_t size;
};

/// Span level: what a row of the mask looks like.
struct RowSpans {
  Spans spans;          // the query attends to no column outside of them
  uint32_t unresolved;  // bit i: node i has yet to be evaluated for each column within
};

/// The columns `[0, kv_length)` that the query may attend to, in O(nodes) (and the logarithm of a
/// table's runs). Documents, blocks and other positions have spans where their tables were prepared
/// (host memory). Host only.
RowSpans row_spans(const Rule& rule, const Query& query, const Positions& kv_positions,
                   int64_t kv_length);

/// The same of one leaf within the columns of `context`, which is not empty.
RowSpans leaf_spans(const Rule& rule, int32_t leaf, const Query& query,
                    const Positions& kv_positions, Interval context);

/// A border between columns that goes up by `slope`, 0 or 1, with each row.
struct MovingBorder {
  int64_t at;  // in the first row
  int64_t slope;

  int64_t in_row(int64_t row) const { return at + slope * row; }
};

struct MovingInterval {
  MovingBorder begin;
  MovingBorder end;
};

struct MovingSpans {
  static constexpr int32_t kMax = Spans::kMax;

  MovingInterval at[kMax];
  int32_t size;
};

/// Row-run level: what some rows, one after the other, look like. From one to the next a span
/// moves by one column at most, and none appears or vanishes.
struct RowRun {
  MovingSpans spans;
  uint32_t unresolved;  // as that of RowSpans, in each of the rows
  int64_t rows;         // > 0

  RowSpans row(int64_t index) const {
    RowSpans result{};
    result.spans.size = spans.size;
    for (int32_t i = 0; i < spans.size; ++i) {
      result.spans.at[i] = {spans.at[i].begin.in_row(index), spans.at[i].end.in_row(index)};
    }
    result.unresolved = unresolved;
    return result;
  }
};

/// The longest run of rows from `query` on, at most `max_rows` (> 0), that is found in O(nodes): in
/// it spans move linearly. Listed positions take O(rows). Host only.
RowRun row_run(const Rule& rule, const Query& query, const Positions& q_positions,
               const Positions& kv_positions, int64_t kv_length, int64_t max_rows);

}  // namespace attn_mask
