#pragma once

#include "rule/leaf/row.h"
#include "rule/table.h"

namespace attn_mask {

/// A query attends to the keys that bear its own number: packed documents, or blocks (images in
/// text), where a negative number belongs to no block.
struct SameId {
  static constexpr bool kIsBand = false;

  Table ids;
  bool negative_is_none;

  ATTN_MASK_INLINE bool attends(const Query& query, const Key& key) const {
    if (!ids.holds(query.position) || !ids.holds(key.position)) {
      return false;
    }
    const int64_t id = ids.at(query.batch, query.position);
    return id == ids.at(query.batch, key.position) && !(negative_is_none && id < 0);
  }

  /// Host only. Exact where the ids are in runs, each of an id of its own.
  LeafRow row(const Query& query) const {
    const int64_t q = query.position;
    if (!ids.holds(q)) {
      return still_row({0, 0}, true, q < 0 ? -q : kOpen);
    }
    const bool prepared = ids.runs.starts != nullptr;
    const int64_t of_batch = ids.row(query.batch);
    const Interval run = prepared ? ids.runs.around(of_batch, q) : Interval{q, q + 1};
    const bool none = ids.at(query.batch, q) < 0;
    if (none && negative_is_none) {
      return still_row({0, 0}, true, run.end - q);
    }
    const bool exact = prepared && !none && ids.runs.is_once[of_batch] != 0;
    return still_row(exact ? run : Interval{0, ids.length}, exact, run.end - q);
  }
};

}  // namespace attn_mask
