#pragma once

#include "bits.h"
#include "rule/key_test.h"
#include "rule/leaf/row.h"

namespace attn_mask {

/// A query attends to a key when a mask that the caller gave says so: one for the positions of each
/// batch row (padding), or one for each row and column of the mask itself. Which keys those are is
/// data, so that no interval can say it: kernels evaluate it key by key.
struct Padding {
  static constexpr bool kIsBand = true;

  const void* mask;      // [batch_size, length], or [batch_size, heads, q_length, kv_length]
  int64_t batch_stride;  // strides are in elements; 0 repeats
  int64_t head_stride;
  int64_t q_stride;  // 0 for padding
  int64_t key_stride;
  int64_t length;        // keys from here on are not attended to
  int32_t element_size;  // 1, 2, 4 or 8 bytes
  bool by_column;        // the mask's rows and columns, not positions, say where to look
  KeyTest visible;

  /// Whether it says the same of a key to all queries of a batch row.
  ATTN_MASK_INLINE bool is_of_keys() const { return q_stride == 0 && head_stride == 0; }

  ATTN_MASK_INLINE int64_t row_offset(const Query& query) const {
    return query.batch * batch_stride + query.head * head_stride + query.row * q_stride;
  }

  ATTN_MASK_INLINE bool attends(const Query& query, const Key& key) const {
    const int64_t place = by_column ? key.column : key.position;
    if (place < 0 || place >= length) {
      return false;
    }
    const int64_t index = row_offset(query) + place * key_stride;
    return with_bits(element_size, [&](auto bits) ATTN_MASK_INLINE_LAMBDA {
      return visible(static_cast<const decltype(bits)*>(mask)[index]);
    });
  }

  ATTN_MASK_INLINE LeafRow row(const Query&) const {
    return still_row(by_column ? kEverywhere : Interval{0, length}, false);
  }
};

}  // namespace attn_mask
