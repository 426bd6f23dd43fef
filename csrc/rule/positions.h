#pragma once

#include <cstdint>

#include "macros.h"
#include "rule/limits.h"

namespace attn_mask {

/// Where the rows (or the columns) of a mask stand: `offset + index`, plus an offset that lies in
/// memory for all or for each batch row; or positions of their own. Memory is the device's and
/// never read on the host.
struct Positions {
  int64_t offset;
  const void* data;      // null: offset alone
  int64_t batch_stride;  // in elements
  int64_t stride;
  int32_t element_size;  // 4 or 8 bytes
  bool listed;           // data holds a position for each index, not an offset

  ATTN_MASK_INLINE int64_t at(int64_t batch, int64_t index) const {
    if (data == nullptr) {
      return offset + index;
    }
    const int64_t place = batch * batch_stride + (listed ? index * stride : 0);
    int64_t value = element_size == 4 ? static_cast<const int32_t*>(data)[place]
                                      : static_cast<const int64_t*>(data)[place];
    value = value > kFar ? kFar : value < -kFar ? -kFar : value;
    return offset + value + (listed ? 0 : index);
  }
};

}  // namespace attn_mask
