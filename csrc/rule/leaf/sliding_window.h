#pragma once

#include "rule/leaf/row.h"

namespace attn_mask {

/// A query attends to the keys from `left` before to `right` after its own position. With Causal
/// that makes windows of `left + 1` keys, the query's own included.
struct SlidingWindow {
  static constexpr bool kIsBand = true;

  int64_t left;   // kOpen: open
  int64_t right;  // kOpen: open

  bool has_table() const { return false; }
  void move(int64_t, int64_t) {}

  ATTN_MASK_INLINE bool attends(const Query& query, const Key& key) const {
    return row(query).keys.contains(key.position);
  }

  ATTN_MASK_INLINE LeafRow row(const Query& query) const {
    return {{query.position - left, query.position + right + 1}, true, 1, 1, kOpen};
  }

  ATTN_MASK_INLINE uint64_t word(const Query& query, const Key& first, int64_t) const {
    return word_of(row(query).keys, first.position);
  }
};

}  // namespace attn_mask
