#pragma once

#include "bits.h"
#include "rule/leaf/row.h"
#include "rule/math/key_test.h"

namespace attn_mask {

/// A query attends to a key where a mask that the caller gave is not zero: one for the positions of
/// each batch row (padding), or one for each row and column of the mask itself. Which keys those
/// are is data, so it is no interval.
struct Padding {
  static constexpr bool kIsBand = true;
  /// As an element size, the spelling of the prepare step on devices: a bit for each key, [rows,
  /// (length + 63) / 64] words, 0 from `length` on. batch_stride is in words, `visible` means
  /// nothing.
  static constexpr int32_t kBits = 0;

  const void* mask;      // [batch_size, length], or [batch_size, heads, q_length, kv_length]
  int64_t batch_stride;  // strides are in elements; 0 repeats
  int64_t head_stride;
  int64_t q_stride;  // 0 for padding
  int64_t key_stride;
  int64_t length;        // keys from here on are not attended to
  int32_t element_size;  // 1, 2, 4 or 8 bytes, or kBits
  bool by_column;        // read at the mask's rows and columns, not at positions
  KeyTest visible;

  /// Whether a key is visible to all queries of a batch row or to none.
  ATTN_MASK_INLINE bool is_of_keys() const { return q_stride == 0 && head_stride == 0; }

  ATTN_MASK_INLINE int64_t row_offset(const Query& query) const {
    return query.batch * batch_stride + query.head * head_stride + query.row * q_stride;
  }

  bool has_table() const { return true; }
  void move(int64_t rows, int64_t columns) {
    if (by_column) {
      mask =
          static_cast<const char*>(mask) + (rows * q_stride + columns * key_stride) * element_size;
      length -= columns;
    }
  }

  ATTN_MASK_INLINE bool attends(const Query& query, const Key& key) const {
    const int64_t place = by_column ? key.column : key.position;
    if (place < 0 || place >= length) {
      return false;
    }
    if (element_size == kBits) {
      return (bits(query, place) & 1) != 0;
    }
    const int64_t index = row_offset(query) + place * key_stride;
    return with_bits(element_size, [&](auto bits) ATTN_MASK_INLINE_LAMBDA {
      return visible(static_cast<const decltype(bits)*>(mask)[index]);
    });
  }

  ATTN_MASK_INLINE LeafRow row(const Query&) const {
    return still_row(by_column ? kEverywhere : Interval{0, length}, false);
  }

  ATTN_MASK_INLINE uint64_t word(const Query& query, const Key& first, int64_t count) const {
    if (element_size == kBits) {
      return bits(query, by_column ? first.column : first.position);
    }
    uint64_t word = 0;
    ATTN_MASK_ONE_BY_ONE
    for (int64_t i = 0; i < count; ++i) {
      word |= uint64_t{attends(query, {first.column + i, first.position + i})} << i;
    }
    return word;
  }

 private:
  /// Which of 64 keys from `key` on are visible.
  ATTN_MASK_INLINE uint64_t bits(const Query& query, int64_t key) const {
    const auto* const words = static_cast<const uint64_t*>(mask) + query.batch * batch_stride;
    // A word begins before `length`; keys before the first one are large numbers.
    const auto end = static_cast<uint64_t>(length);
    const int64_t index = key >> 6;
    const int64_t shift = key & 63;
    const uint64_t first = static_cast<uint64_t>(key) & ~uint64_t{63};
    const uint64_t low = first < end ? words[index] : 0;
    const uint64_t high = shift != 0 && first + 64 < end ? words[index + 1] : 0;
    return shift == 0 ? low : low >> shift | high << (64 - shift);
  }
};

}  // namespace attn_mask
