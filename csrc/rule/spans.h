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
  uint32_t unresolved;  // bit i: node i has yet to be asked about each column within
};

/// The columns `[0, kv_length)` that the query may attend to, in O(nodes). Documents, blocks and
/// other positions have spans where their tables were prepared (host memory). Host only.
RowSpans row_spans(const Rule& rule, const Query& query, const Positions& kv_positions,
                   int64_t kv_length);

/// The same of one leaf within the columns of `context`, which is not empty.
RowSpans leaf_spans(const Rule& rule, int32_t leaf, const Query& query,
                    const Positions& kv_positions, Interval context);

}  // namespace attn_mask
