#pragma once

#include "rule/leaf/row.h"

namespace attn_mask {

/// A query attends to itself and to what came before it.
struct Causal {
  static constexpr bool kIsBand = true;

  bool has_table() const { return false; }
  void move(int64_t, int64_t) {}

  ATTN_MASK_INLINE bool attends(const Query& query, const Key& key) const {
    return key.position <= query.position;
  }

  ATTN_MASK_INLINE LeafRow row(const Query& query) const {
    return {{-kOpen, query.position + 1}, true, 0, 1, kOpen};
  }

  ATTN_MASK_INLINE uint64_t word(const Query& query, const Key& first, int64_t) const {
    return word_of(row(query).keys, first.position);
  }
};

}  // namespace attn_mask
