#pragma once

#include "bits.h"
#include "rule/leaf/padding.h"

namespace attn_mask::ATTN_MASK_ISA {

template <typename In, typename Out>
void translate(const In* in, int64_t stride, int64_t n, KeyTest visible, Out attend, Out masked,
               Out* out) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = visible(in[i]) ? attend : masked;
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = visible(in[i * stride]) ? attend : masked;
    }
  }
}

/// Writes the padding's values at `n` keys from `first` on to `out`.
template <typename Out>
void translate(const Padding& padding, const Query& query, int64_t first, int64_t n, Out attend,
               Out masked, Out* out) {
  const int64_t offset = padding.row_offset(query) + first * padding.key_stride;
  with_bits(padding.element_size, [&](auto bits) {
    translate(static_cast<const decltype(bits)*>(padding.mask) + offset, padding.key_stride, n,
              padding.visible, attend, masked, out);
  });
}

}  // namespace attn_mask::ATTN_MASK_ISA
