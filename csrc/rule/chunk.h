#pragma once

#include "rule/interval.h"
#include "rule/table.h"

namespace attn_mask {

/// A query attends to the keys of its own chunk; chunks of `size` positions begin behind each batch
/// row's left padding.
struct Chunk {
  int64_t size;   // > 0, at most kOpen
  Table padding;  // [batch_size or 1, 1]: how many positions come first; no data: none

  ATTN_MASK_INLINE Interval span(int64_t batch, int64_t q) const {
    const int64_t before = !padding.exists() ? 0 : padding.position_at(batch, 0);
    const int64_t distance = q - before;
    // Division rounds towards zero; chunks go on below it.
    const int64_t chunk = distance / size - (distance % size < 0 ? 1 : 0);
    const int64_t begin = before + chunk * size;
    return {begin, begin + size};
  }
};

}  // namespace attn_mask
