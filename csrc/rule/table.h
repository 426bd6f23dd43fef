#pragma once

#include <cstdint>

#include "macros.h"
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
  const void* data;
  int64_t batch_stride;  // in elements; 0 where one row serves the whole batch
  int64_t stride;
  int64_t length;
  int32_t element_size;  // 4 or 8 bytes
  TableRuns runs;        // null pointers where nothing was prepared

  ATTN_MASK_INLINE bool holds(int64_t position) const { return 0 <= position && position < length; }

  /// The number at `position`, which the table must hold.
  ATTN_MASK_INLINE int64_t at(int64_t batch, int64_t position) const {
    const int64_t index = batch * batch_stride + position * stride;
    const int64_t value = element_size == 4 ? static_cast<const int32_t*>(data)[index]
                                            : static_cast<const int64_t*>(data)[index];
    return value > kFar ? kFar : value < -kFar ? -kFar : value;
  }
};

}  // namespace attn_mask
