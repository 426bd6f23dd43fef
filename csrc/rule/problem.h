#pragma once

#include "rule/rule.h"

namespace attn_mask {

/// What a mask shows: which keys each query may attend to, and the positions of queries and keys.
struct Problem {
  Rule rule;
  int64_t batch_size;
  int64_t heads;  // all alike but for what is given for each head
  int64_t q_length;
  int64_t kv_length;
  Positions q_positions;
  Positions kv_positions;

  ATTN_MASK_INLINE int64_t rows() const { return batch_size * heads * q_length; }

  /// Whether the mask has no element. Kernels, spans and runs need one: operators return
  /// before they run.
  ATTN_MASK_INLINE bool empty() const {
    return batch_size == 0 || heads == 0 || q_length == 0 || kv_length == 0;
  }

  /// The query of row `row` of a plane; planes are counted through heads and batch.
  ATTN_MASK_INLINE Query query(int64_t plane, int64_t row) const {
    const int64_t batch = plane / heads;
    return {batch, plane - batch * heads, row, q_positions.at(batch, row)};
  }
  ATTN_MASK_INLINE Key key(int64_t batch, int64_t column) const {
    return {column, kv_positions.at(batch, column)};
  }

  /// The problem of rows `[begin, end)` of each plane. Masks in the rule that were given for each
  /// row of the mask stay where they are.
  Problem part(int64_t begin, int64_t end) const {
    Problem rows = *this;
    rows.q_length = end - begin;
    if (q_positions.listed) {
      rows.q_positions.numbers.data = q_positions.numbers.address(begin * q_positions.stride);
    } else {
      rows.q_positions.offset += begin;
    }
    return rows;
  }
};

}  // namespace attn_mask
