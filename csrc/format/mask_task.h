#pragma once

#include "format/dense.h"
#include "format/question.h"

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

/// All that a kernel needs to write one dense mask: what is asked, and where and how to write the
/// answer.
struct MaskTask : Question {
  DenseFormat format;
  Bias bias;
  Opening opening;
  void* out;               // [batch_size, heads, q_length, kv_length]
  int64_t out_strides[4];  // in elements

  /// Where a query's row begins, in elements from `out`.
  ATTN_MASK_INLINE int64_t out_offset(const Query& query) const {
    return query.batch * out_strides[0] + query.head * out_strides[1] + query.row * out_strides[2];
  }

  /// The task of rows `[begin, end)` of each plane. Masks in the rule that were given for each row
  /// of the mask stay where they are.
  MaskTask part(int64_t begin, int64_t end) const {
    MaskTask task = *this;
    static_cast<Question&>(task) = Question::part(begin, end);
    task.bias.data = bias.data == nullptr ? nullptr
                                          : static_cast<const char*>(bias.data) +
                                                begin * bias.strides[2] * format.element_size;
    task.out = static_cast<char*>(out) + begin * out_strides[2] * format.element_size;
    return task;
  }
};

}  // namespace attn_mask
