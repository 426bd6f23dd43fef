#pragma once

// What one thread of each kernel does, so that the same lines run under an emulated grid on the
// host. Where threads of a block must wait for each other, a body is cut into what comes before and
// after the barrier.

#include "cuda/grid.h"
#include "format/strided_rows.h"
#include "rule/math/interval.h"

namespace attn_mask {

/// One 16-byte store, put together in registers.
struct alignas(16) Pack {
  uint64_t words[2];
};

template <typename T>
inline constexpr int64_t kPackSize = sizeof(Pack) / sizeof(T);

/// The bits of `value` in every element of 8 bytes.
template <typename T>
ATTN_MASK_INLINE uint64_t repeat(uint64_t value) {
  uint64_t word = static_cast<T>(value);
  for (uint32_t bits = 8 * sizeof(T); bits < 64; bits *= 2) {
    word |= word << bits;
  }
  return word;
}

/// The element at `index` of a pack.
template <typename T>
ATTN_MASK_INLINE T element_of(const Pack& pack, int64_t index) {
  const int64_t bit = index * 8 * static_cast<int64_t>(sizeof(T));
  return static_cast<T>((bit < 64 ? pack.words[0] : pack.words[1]) >> (bit % 64));
}

/// The part of `length` items that thread `thread` of `threads` goes through.
ATTN_MASK_INLINE Interval part_of(int64_t length, int64_t thread, int64_t threads) {
  const int64_t size = (length + threads - 1) / threads;
  return intersect({thread * size, (thread + 1) * size}, {0, length});
}

/// How the threads of a block share a row: whole packs where all are aligned alike, and elements
/// before, after and elsewhere.
template <typename T>
struct RowPacks {
  int64_t before;  // elements
  int64_t packs;
  int64_t after;  // where the elements after them begin

  ATTN_MASK_INLINE RowPacks(const T* in, int64_t in_stride, const T* out, int64_t out_stride,
                            int64_t length) {
    const uintptr_t past = reinterpret_cast<uintptr_t>(in) % sizeof(Pack);
    const bool alike = in_stride == 1 && out_stride == 1 &&
                       past == reinterpret_cast<uintptr_t>(out) % sizeof(Pack);
    const auto to_pack = static_cast<int64_t>((sizeof(Pack) - past) % sizeof(Pack) / sizeof(T));
    before = !alike || to_pack > length ? length : to_pack;
    packs = (length - before) / kPackSize<T>;
    after = before + packs * kPackSize<T>;
  }
};

template <typename T>
struct UnmaskRow {
  const UnmaskParams& params;
  const T* in;
  T* out;
  RowPacks<T> split;

  ATTN_MASK_INLINE UnmaskRow(const UnmaskParams& of, int64_t row)
      : params(of),
        in(static_cast<const T*>(of.in.data) + of.in.row_offset(row)),
        out(static_cast<T*>(of.written) + of.out.row_offset(row)),
        split(in, of.in.stride, out, of.out.stride, of.in.length) {}

  /// First half, for one thread of the block that has the row: whether any of its elements is not
  /// the minimum. The row is unmasked where that is so for no thread.
  ATTN_MASK_INLINE bool attended_body(int64_t thread, int64_t threads) const {
    for (int64_t i = thread; i < split.before; i += threads) {
      if (!params.is_min(in[i * params.in.stride])) {
        return true;
      }
    }
    for (int64_t i = split.after + thread; i < params.in.length; i += threads) {
      if (!params.is_min(in[i])) {
        return true;
      }
    }
    for (int64_t i = thread; i < split.packs; i += threads) {
      const Pack pack = reinterpret_cast<const Pack*>(in + split.before)[i];
      for (int64_t element = 0; element < kPackSize<T>; ++element) {
        if (!params.is_min(element_of<T>(pack, element))) {
          return true;
        }
      }
    }
    return false;
  }

  /// Second half: writes the thread's elements.
  ATTN_MASK_INLINE void write_body(bool unmasked, int64_t thread, int64_t threads) const {
    const T keep = unmasked ? static_cast<T>(params.sign) : static_cast<T>(~T{0});
    for (int64_t i = thread; i < split.before; i += threads) {
      out[i * params.out.stride] = static_cast<T>(in[i * params.in.stride] & keep);
    }
    for (int64_t i = split.after + thread; i < params.in.length; i += threads) {
      out[i] = static_cast<T>(in[i] & keep);
    }
    const uint64_t keep_word = repeat<T>(keep);
    for (int64_t i = thread; i < split.packs; i += threads) {
      Pack pack = reinterpret_cast<const Pack*>(in + split.before)[i];
      pack.words[0] &= keep_word;
      pack.words[1] &= keep_word;
      reinterpret_cast<Pack*>(out + split.before)[i] = pack;
    }
  }
};

}  // namespace attn_mask
