#pragma once

#include "rule/key_test.h"
#include "rule/query.h"

namespace attn_mask {

/// A query attends to a key when a mask that the caller gave says so: one for each key of a batch
/// row (padding, `q_stride` 0), or one for each query and key. Which keys those are is data, so a
/// span can't say it: kernels ask key by key.
struct Padding {
  const void* mask;      // [batch_size, q_length or 1, kv_length]
  int64_t batch_stride;  // strides are in elements; 0 repeats
  int64_t q_stride;
  int64_t key_stride;
  int32_t element_size;  // 1, 2, 4 or 8 bytes
  KeyTest visible;

  ATTN_MASK_INLINE int64_t row_offset(const Query& query) const {
    return query.batch * batch_stride + query.row * q_stride;
  }

  ATTN_MASK_INLINE bool attends(const Query& query, int64_t key) const {
    const int64_t index = row_offset(query) + key * key_stride;
    switch (element_size) {
      case 1:
        return visible(static_cast<const uint8_t*>(mask)[index]);
      case 2:
        return visible(static_cast<const uint16_t*>(mask)[index]);
      case 4:
        return visible(static_cast<const uint32_t*>(mask)[index]);
      default:
        return visible(static_cast<const uint64_t*>(mask)[index]);
    }
  }
};

}  // namespace attn_mask
