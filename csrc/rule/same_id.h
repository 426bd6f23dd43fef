#pragma once

#include "rule/table.h"

namespace attn_mask {

/// A query attends to the keys that bear its own number: packed documents, or blocks (images in
/// text), where a negative number belongs to no block.
struct SameId {
  Table ids;
  bool negative_is_none;

  ATTN_MASK_INLINE bool attends(int64_t batch, int64_t q, int64_t key) const {
    if (!ids.holds(q) || !ids.holds(key)) {
      return false;
    }
    const int64_t id = ids.at(batch, q);
    return id == ids.at(batch, key) && !(negative_is_none && id < 0);
  }
};

}  // namespace attn_mask
