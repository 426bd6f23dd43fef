#pragma once

#include "rule/key_test.h"
#include "rule/query.h"

namespace attn_mask {

/// A query attends to a key when a mask that the caller gave says so: one for the positions of each
/// batch row (padding), or one for each row and column of the mask itself. Which keys those are is
/// data, so a span can't say it.
struct Padding {
  /// The prepare step's spelling: a bit for each key, [rows, (length + 63) / 64] words, 0 from
  /// `length` on; batch_stride is in words, and `visible` means nothing.
  static constexpr int32_t kBits = 0;

  const void* mask;      // [batch_size, length], or [batch_size, heads, q_length, kv_length]
  int64_t batch_stride;  // strides are in elements; 0 repeats
  int64_t head_stride;
  int64_t q_stride;  // 0 for padding
  int64_t key_stride;
  int64_t length;        // keys from here on are not attended to
  int32_t element_size;  // 1, 2, 4 or 8 bytes; kBits
  bool by_column;        // the mask's rows and columns, not positions, say where to look
  KeyTest visible;

  ATTN_MASK_INLINE int64_t row_offset(const Query& query) const {
    return query.batch * batch_stride + query.head * head_stride + query.row * q_stride;
  }

  /// Of bits: which of the keys from `key` on are visible.
  ATTN_MASK_INLINE uint64_t word(const Query& query, int64_t key) const {
    const auto* const words = static_cast<const uint64_t*>(mask) + query.batch * batch_stride;
    const int64_t size = (length + 63) / 64;
    const int64_t index = key >> 6;
    const int64_t shift = key & 63;
    const uint64_t low = 0 <= index && index < size ? words[index] : 0;
    const uint64_t high = 0 <= index + 1 && index + 1 < size ? words[index + 1] : 0;
    return shift == 0 ? low : low >> shift | high << (64 - shift);
  }

  ATTN_MASK_INLINE bool attends(const Query& query, int64_t key) const {
    if (key < 0 || key >= length) {
      return false;
    }
    const int64_t index = row_offset(query) + key * key_stride;
    switch (element_size) {
      case kBits:
        return (word(query, key) & 1) != 0;
      case 1:
        return visible(static_cast<const uint8_t*>(mask)[index]);
      case 2:
        return visible(static_cast<const uint16_t*>(mask)[index]);
      case 4:
        return visible(static_cast<const uint32_t*>(mask)[index]);
      default:
        return visible(static_cast<const uint64_t*>(mask)[index]);
    }
  }
};

}  // namespace attn_mask
