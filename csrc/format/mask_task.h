#pragma once

#include "format/dense.h"
#include "rule/rule.h"

namespace attn_mask {

/// What attended elements hold in place of the format's `attend`: elements of the mask's own size.
struct Bias {
  const void* data;    // [batch_size, heads, q_length, kv_length]; null: none
  int64_t strides[4];  // in elements; 0 repeats
};

/// Rows in which no key is attended to are opened, for attention that would give NaN. For rules of
/// causality, a window and padding.
struct Opening {
  const int64_t*
      next_visible;  // [batch_size, length]: the first visible key from each on; null: no
  int64_t length;
  uint64_t opened;  // the bits of an opened element

  /// `positions`: the hull of the row.
  ATTN_MASK_INLINE bool opens(int64_t batch, Interval positions) const {
    if (next_visible == nullptr) {
      return false;
    }
    const Interval keys = intersect(positions, {0, length});
    return keys.empty() || next_visible[batch * length + keys.begin] >= keys.end;
  }
};

/// All that a kernel needs to write one dense mask: the rule, the question's extent and where and
/// how to write the answer.
struct MaskTask {
  Rule rule;
  int64_t batch_size;
  int64_t heads;  // all alike but for the bias and masks given for each head
  int64_t q_length;
  int64_t kv_length;
  Positions q_positions;
  Positions kv_positions;
  DenseFormat format;
  Bias bias;
  Opening opening;
  void* out;               // [batch_size, heads, q_length, kv_length]
  int64_t out_strides[4];  // in elements

  ATTN_MASK_INLINE int64_t rows() const { return batch_size * heads * q_length; }

  /// Where a query's row begins, in elements from `out`.
  ATTN_MASK_INLINE int64_t out_offset(const Query& query) const {
    return query.batch * out_strides[0] + query.head * out_strides[1] + query.row * out_strides[2];
  }

  /// The query of row `row` of a plane; planes are counted through heads and batch.
  ATTN_MASK_INLINE Query query(int64_t plane, int64_t row) const {
    const int64_t batch = plane / heads;
    return {batch, plane - batch * heads, row, q_positions.at(batch, row)};
  }
  ATTN_MASK_INLINE Key key(int64_t batch, int64_t column) const {
    return {column, kv_positions.at(batch, column)};
  }

  /// The task of rows `[begin, end)` of each plane. Masks in the rule that were given for each row
  /// of the mask stay where they are.
  MaskTask part(int64_t begin, int64_t end) const {
    MaskTask task = *this;
    task.q_length = end - begin;
    if (q_positions.listed) {
      task.q_positions.numbers.data = q_positions.numbers.address(begin * q_positions.stride);
    } else {
      task.q_positions.offset += begin;
    }
    task.bias.data = bias.data == nullptr ? nullptr
                                          : static_cast<const char*>(bias.data) +
                                                begin * bias.strides[2] * format.element_size;
    task.out = static_cast<char*>(out) + begin * out_strides[2] * format.element_size;
    return task;
  }
};

}  // namespace attn_mask
