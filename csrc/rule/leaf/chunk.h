#pragma once

#include "rule/leaf/row.h"
#include "rule/math/divisor.h"
#include "rule/math/integers.h"

namespace attn_mask {

/// A query attends to the keys of its own chunk; chunks of `size` positions begin after each batch
/// row's left padding.
struct Chunk {
  static constexpr bool kIsBand = false;

  int64_t size;  // > 0, at most kOpen
  Divisor by_size;
  Integers padding;      // [batch_size or 1]: how many positions come first; no data: none
  int64_t batch_stride;  // in elements; 0 repeats

  /// The positions of the query's chunk.
  ATTN_MASK_INLINE Interval keys(const Query& query) const {
    const int64_t before =
        padding.data == nullptr ? 0 : within_far(padding.at(query.batch * batch_stride));
    const int64_t begin = before + by_size.floor(query.position - before) * size;
    return {begin, begin + size};
  }

  bool has_table() const { return padding.data != nullptr; }
  void move(int64_t, int64_t) {}

  ATTN_MASK_INLINE bool attends(const Query& query, const Key& key) const {
    return keys(query).contains(key.position);
  }

  ATTN_MASK_INLINE LeafRow row(const Query& query) const {
    const Interval chunk = keys(query);
    return still_row(chunk, true, chunk.end - query.position);
  }

  ATTN_MASK_INLINE uint64_t word(const Query& query, const Key& first, int64_t) const {
    return word_of(keys(query), first.position);
  }
};

}  // namespace attn_mask
