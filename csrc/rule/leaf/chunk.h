#pragma once

#include "rule/leaf/row.h"
#include "rule/table.h"

namespace attn_mask {

/// A query attends to the keys of its own chunk; chunks of `size` positions begin after each batch
/// row's left padding.
struct Chunk {
  static constexpr bool kIsBand = false;

  int64_t size;   // > 0, at most kOpen
  Table padding;  // [batch_size or 1, 1]: how many positions come first; no data: none

  /// The positions of the query's chunk.
  ATTN_MASK_INLINE Interval keys(const Query& query) const {
    const int64_t before = !padding.exists() ? 0 : padding.position_at(query.batch, 0);
    const int64_t distance = query.position - before;
    // Division rounds towards zero; chunks go on below it.
    const int64_t chunk = distance / size - (distance % size < 0 ? 1 : 0);
    const int64_t begin = before + chunk * size;
    return {begin, begin + size};
  }

  ATTN_MASK_INLINE bool attends(const Query& query, const Key& key) const {
    return keys(query).contains(key.position);
  }

  ATTN_MASK_INLINE LeafRow row(const Query& query) const {
    const Interval chunk = keys(query);
    return still_row(chunk, true, chunk.end - query.position);
  }
};

}  // namespace attn_mask
