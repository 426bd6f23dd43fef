#pragma once

#include "macros.h"
#include "rule/math/key_test.h"
#include "rule/math/limits.h"

namespace attn_mask {

/// Rows of an existing tensor, read where they lie: up to three leading dimensions of any stride, 0
/// included, and a last dimension of `length` elements.
struct StridedRows {
  static constexpr int32_t kLeading = 3;

  const void* data;
  int64_t sizes[kLeading];
  int64_t strides[kLeading];  // in elements
  int64_t length;
  int64_t stride;        // of the last dimension, in elements
  int32_t element_size;  // 1, 2, 4 or 8 bytes

  ATTN_MASK_INLINE int64_t rows() const { return sizes[0] * sizes[1] * sizes[2]; }

  /// Where row `row` begins, in elements from `data`.
  ATTN_MASK_INLINE int64_t row_offset(int64_t row) const {
    const int64_t inner = row % sizes[2];
    const int64_t rest = row / sizes[2];
    return inner * strides[2] + rest % sizes[1] * strides[1] + rest / sizes[1] * strides[0];
  }
};

/// Copies `in` to `out`, which may be the same memory, and unmasks the rows in which `is_min`
/// holds throughout: their elements keep nothing but their sign.
struct UnmaskParams {
  StridedRows in;
  StridedRows out;  // the layout of what lies at `written`
  KeyTest is_min;
  uint64_t sign;  // the sign bit of a floating dtype; 0 for integers
  void* written;
};

static_assert(sizeof(UnmaskParams) <= kMaxParameterBytes);

}  // namespace attn_mask
