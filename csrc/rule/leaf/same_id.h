#pragma once

#include "rule/leaf/row.h"
#include "rule/math/table.h"

namespace attn_mask {

/// A query attends to the keys that bear its own number: packed documents, or blocks (images in
/// text), where a negative number belongs to no block.
struct SameId {
  static constexpr bool kIsBand = false;

  Table ids;
  bool negative_is_none;

  bool has_table() const { return true; }
  void move(int64_t, int64_t) {}

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

  /// Whether the keys that each query of a batch row attends to are one run, known on the device.
  ATTN_MASK_INLINE bool has_run(int64_t batch) const {
    return ids.bounds.begin != nullptr && ids.runs.repeats[ids.row(batch)] <= 1;
  }

  /// That run. Of a query that belongs to none it is empty, and lies where the query stands, so
  /// that runs go upwards with queries.
  ATTN_MASK_INLINE Interval run(const Query& query) const {
    const int64_t q = query.position;
    return ids.holds(q) ? ids.run(query.batch, q) : Interval{q, q};
  }

  ATTN_MASK_INLINE uint64_t word(const Query& query, const Key& first, int64_t count) const {
    if (has_run(query.batch)) {
      return word_of(run(query), first.position);
    }
    uint64_t word = 0;
    ATTN_MASK_ONE_BY_ONE
    for (int64_t i = 0; i < count; ++i) {
      word |= uint64_t{attends(query, {first.column + i, first.position + i})} << i;
    }
    return word;
  }
};

}  // namespace attn_mask
