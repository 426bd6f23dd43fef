#pragma once

#include "rule/interval.h"
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

  /// Whether the keys that each query of a batch row attends to are one run, known on the device.
  ATTN_MASK_INLINE bool has_span(int64_t batch) const {
    return ids.bounds.begin != nullptr && ids.runs.is_once[ids.row(batch)] != 0;
  }

  /// That run. Of a query that belongs to none it is empty, and lies where the query stands, so
  /// that spans go upwards with queries.
  ATTN_MASK_INLINE Interval span(int64_t batch, int64_t q) const {
    return ids.holds(q) ? ids.run(batch, q) : Interval{q, q};
  }
};

}  // namespace attn_mask
