#pragma once

#include "rule/leaf/row.h"

namespace attn_mask {

/// A query attends to every key.
struct All {
  static constexpr bool kIsBand = true;

  bool has_table() const { return false; }
  void move(int64_t, int64_t) {}

  ATTN_MASK_INLINE bool attends(const Query&, const Key&) const { return true; }
  ATTN_MASK_INLINE LeafRow row(const Query&) const { return still_row(kEverywhere, true); }
  ATTN_MASK_INLINE uint64_t word(const Query&, const Key&, int64_t) const { return ~uint64_t{0}; }
};

/// A query attends to no key.
struct Nothing {
  static constexpr bool kIsBand = true;

  bool has_table() const { return false; }
  void move(int64_t, int64_t) {}

  ATTN_MASK_INLINE bool attends(const Query&, const Key&) const { return false; }
  ATTN_MASK_INLINE LeafRow row(const Query&) const { return still_row({0, 0}, true); }
  ATTN_MASK_INLINE uint64_t word(const Query&, const Key&, int64_t) const { return 0; }
};

}  // namespace attn_mask
