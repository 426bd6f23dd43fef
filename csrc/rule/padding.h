#pragma once

#include "bits.h"
#include "rule/key_test.h"
#include "rule/query.h"

namespace attn_mask {

/// A query attends to a key when a mask that the caller gave says so: one for the positions of each
/// batch row (padding), or one for each row and column of the mask itself. Which keys those are is
/// data, so a span can't say it: kernels ask key by key.
struct Padding {
  const void* mask;      // [batch_size, length], or [batch_size, heads, q_length, kv_length]
  int64_t batch_stride;  // strides are in elements; 0 repeats
  int64_t head_stride;
  int64_t q_stride;  // 0 for padding
  int64_t key_stride;
  int64_t length;        // keys from here on are not attended to
  int32_t element_size;  // 1, 2, 4 or 8 bytes
  bool by_column;        // the mask's rows and columns, not positions, say where to look
  KeyTest visible;

  ATTN_MASK_INLINE int64_t row_offset(const Query& query) const {
    return query.batch * batch_stride + query.head * head_stride + query.row * q_stride;
  }

  ATTN_MASK_INLINE bool attends(const Query& query, int64_t key) const {
    if (key < 0 || key >= length) {
      return false;
    }
    const int64_t index = row_offset(query) + key * key_stride;
    return with_bits(element_size, [&](auto bits) ATTN_MASK_INLINE_LAMBDA {
      return visible(static_cast<const decltype(bits)*>(mask)[index]);
    });
  }
};

}  // namespace attn_mask
