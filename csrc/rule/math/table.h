#pragma once

#include <cstdint>

#include "macros.h"
#include "rule/math/integers.h"
#include "rule/math/interval.h"
#include "rule/math/limits.h"

namespace attn_mask {

/// Where the runs of a table begin, if it is on the host (see runs.h). A run of ids is
/// of equal numbers, one of positions goes up by 1 each.
struct TableRuns {
  const int64_t* starts;  // of each row: the first positions of its runs, ascending, then `length`;
                          // the first is where the table begins to be read
  const int64_t* of_row;  // [rows]: where in `starts` a row's begin
  const int64_t* last;    // [rows]: where in `starts` its last run's begins
  union {
    const uint8_t* is_once;  // [rows]: no id >= 0 has two runs
    const int32_t* repeats;  // on a device: up to 1 where no id that counts is seen to have two
  };

  int64_t count(int64_t row) const { return last[row] - of_row[row] + 1; }

  /// The run around a position that the table holds.
  Interval around(int64_t row, int64_t position) const {
    int64_t low = of_row[row];  // begins at or before the position
    int64_t high = last[row];   // as far as it may lie
    while (low < high) {
      const int64_t middle = low + (high - low + 1) / 2;
      if (starts[middle] <= position) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return {starts[low], starts[low + 1]};
  }
};

/// The same as the prepare step on a device leaves it, for each position of each row.
struct RunBounds {
  const int32_t* begin;  // [rows, length]: where the position's run begins; null: not prepared
  const int32_t* end;    // and ends; at its begin where the position belongs to no block
};

/// Integers for positions: ids of documents or blocks, or other positions. [batch_size or 1,
/// length].
struct Table {
  Integers numbers;      // no data: no table
  int64_t batch_stride;  // in elements; 0 where one row serves the whole batch
  int64_t stride;
  int64_t length;
  TableRuns runs;  // null pointers where nothing was prepared
  RunBounds bounds;

  ATTN_MASK_INLINE bool exists() const { return numbers.data != nullptr; }

  /// Which of the table's rows serves a batch row.
  ATTN_MASK_INLINE int64_t row(int64_t batch) const { return batch_stride == 0 ? 0 : batch; }

  /// The run around a position that the table holds, whose bounds are prepared.
  ATTN_MASK_INLINE Interval run(int64_t batch, int64_t position) const {
    const int64_t index = row(batch) * length + position;
    return {bounds.begin[index], bounds.end[index]};
  }

  ATTN_MASK_INLINE bool holds(int64_t position) const { return 0 <= position && position < length; }

  /// The number at `position`, which the table must hold.
  ATTN_MASK_INLINE int64_t at(int64_t batch, int64_t position) const {
    return numbers.at(batch * batch_stride + position * stride);
  }

  /// The same as a position.
  ATTN_MASK_INLINE int64_t position_at(int64_t batch, int64_t position) const {
    return within_far(at(batch, position));
  }
};

}  // namespace attn_mask
