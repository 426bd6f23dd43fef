#pragma once

#include "format/dense.h"
#include "rule/problem.h"

namespace attn_mask {

/// What attended elements hold in place of the format's `attend`: elements of the mask's own size.
struct Bias {
  const void* data;    // [batch_size, heads, q_length, kv_length]; null: none
  int64_t strides[4];  // in elements; 0 repeats
};

/// Fully masked rows that are unmasked, for attention that would give NaN for them: every element
/// of such a row becomes `value`, or its bias.
struct Unmasking {
  const uint8_t* rows;  // [batch_size, heads, q_length]: 1 where no key is visible; null: none, or
                        // the kernel finds that out by itself
  uint64_t value;       // the bits of an element; with a bias, those of `attend`
  bool wanted;
};

/// All that a kernel needs to write one dense mask: what to evaluate, and where and how to write
/// the result.
struct MaskParams : Problem {
  DenseFormat format;
  Bias bias;
  Unmasking unmasking;
  void* out;               // [batch_size, heads, q_length, kv_length]
  int64_t out_strides[4];  // in elements

  /// Whether row `row` of all the mask's rows is to be unmasked.
  ATTN_MASK_INLINE bool unmasks(int64_t row) const {
    return unmasking.rows != nullptr && unmasking.rows[row] != 0;
  }

  /// Where a query's row begins, in elements from `out`.
  ATTN_MASK_INLINE int64_t out_offset(const Query& query) const {
    return query.batch * out_strides[0] + query.head * out_strides[1] + query.row * out_strides[2];
  }

  /// The params of rows `[begin, end)` of each plane. Masks in the rule that were given for each
  /// row of the mask stay where they are.
  MaskParams part(int64_t begin, int64_t end) const {
    MaskParams params = *this;
    static_cast<Problem&>(params) = Problem::part(begin, end);
    params.bias.data = bias.data == nullptr ? nullptr
                                            : static_cast<const char*>(bias.data) +
                                                  begin * bias.strides[2] * format.element_size;
    params.out = static_cast<char*>(out) + begin * out_strides[2] * format.element_size;
    return params;
  }
};

static_assert(sizeof(MaskParams) + sizeof(int64_t) <= kMaxParameterBytes);  // and packs_per_row

}  // namespace attn_mask
