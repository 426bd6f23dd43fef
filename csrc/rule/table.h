#pragma once

#include <cstdint>

#include "macros.h"
#include "rule/integers.h"
#include "rule/limits.h"

namespace attn_mask {

/// What the prepare step finds out about a table on the host: where runs of neighbours end. All
/// [rows of the table, length] but the last.
struct TableRuns {
  const int64_t* same_begin;    // first position of the run of equal numbers around a position
  const int64_t* same_end;      // one past its last
  const int64_t* affine_end;    // one past the last position up to which numbers go up by 1 each
  const uint8_t* same_is_once;  // [rows]: no number >= 0 has two runs
};

/// Integers for positions: ids of documents or blocks, or other positions. [batch_size or 1,
/// length].
struct Table {
  Integers numbers;      // no data: no table
  int64_t batch_stride;  // in elements; 0 where one row serves the whole batch
  int64_t stride;
  int64_t length;
  TableRuns runs;  // null pointers where nothing was prepared

  ATTN_MASK_INLINE bool exists() const { return numbers.data != nullptr; }

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
