#pragma once

#include "rule/divisor.h"
#include "rule/integers.h"
#include "rule/interval.h"
#include "rule/limits.h"

namespace attn_mask {

/// A query attends to the keys of its own chunk; chunks of `size` positions begin after each batch
/// row's left padding.
struct Chunk {
  Divisor size;          // at most kOpen
  Integers padding;      // [batch_size or 1]: how many positions come first; no data: none
  int64_t batch_stride;  // in elements; 0 repeats

  ATTN_MASK_INLINE Interval span(int64_t batch, int64_t q) const {
    const int64_t before =
        padding.data == nullptr ? 0 : within_far(padding.at(batch * batch_stride));
    const int64_t begin = before + size.floor(q - before) * size.value();
    return {begin, begin + size.value()};
  }
};

}  // namespace attn_mask
