#pragma once

#include <cstdint>

#include "macros.h"
#include "rule/math/integers.h"
#include "rule/math/limits.h"

namespace attn_mask {

/// The positions of the rows (or the columns) of a mask: `offset + index`, plus an offset that lies
/// in memory for all or for each batch row; or positions of their own. Memory is the device's and
/// never read on the host.
struct Positions {
  int64_t offset;
  Integers numbers;      // no data: offset alone
  int64_t batch_stride;  // in elements
  int64_t stride;
  bool listed;  // numbers hold a position for each index, not an offset

  ATTN_MASK_INLINE int64_t at(int64_t batch, int64_t index) const {
    if (numbers.data == nullptr) {
      return offset + index;
    }
    const int64_t value =
        within_far(numbers.at(batch * batch_stride + (listed ? index * stride : 0)));
    return offset + value + (listed ? 0 : index);
  }
};

}  // namespace attn_mask
