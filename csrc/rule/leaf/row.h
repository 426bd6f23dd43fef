#pragma once

#include "rule/math/interval.h"
#include "rule/math/limits.h"
#include "rule/math/query.h"

namespace attn_mask {

/// All positions.
inline constexpr Interval kEverywhere = {-kOpen, kOpen};

/// A leaf's keys in the row of a query, and in the rows after it if their positions go up by 1.
struct LeafRow {
  Interval keys;        // the query attends to no position outside of it
  bool exact;           // and to every one within
  int64_t begin_slope;  // what `keys.begin` goes up by with each row, 0 or 1
  int64_t end_slope;
  int64_t rows;  // > 0: for how many rows that holds
};

/// The same keys for so many rows.
ATTN_MASK_INLINE LeafRow still_row(Interval keys, bool exact, int64_t rows = kOpen) {
  return {keys, exact, 0, 0, rows};
}

}  // namespace attn_mask
