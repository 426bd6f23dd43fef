#pragma once

// What one thread of each kernel does, so that the same lines run under an emulated grid on the
// host. Where threads of a block must wait for each other, a body is cut into what comes before and
// after the barrier.

#include "cuda/grid.h"
#include "format/mask_params.h"
#include "format/strided_rows.h"
#include "rule/hull.h"

// Before a loop over elements: many copies of a rule's evaluation would spill registers.
#if defined(__CUDA_ARCH__)
#define ATTN_MASK_ONE_BY_ONE _Pragma("unroll 1")
#else
#define ATTN_MASK_ONE_BY_ONE
#endif

namespace attn_mask {

/// One 16-byte store, put together in registers.
struct alignas(16) Pack {
  uint64_t words[2];
};

template <typename T>
inline constexpr int64_t kPackSize = sizeof(Pack) / sizeof(T);

/// How many stores of 16 bytes a row may take: rows begin anywhere, so that the first and the last
/// may be short. Fewer where all rows are aligned.
template <typename T>
inline int64_t packs_per_row(const MaskParams& params) {
  constexpr int64_t kSize = kPackSize<T>;
  const bool aligned = reinterpret_cast<uintptr_t>(params.out) % sizeof(Pack) == 0 &&
                       (params.batch_size == 1 || params.out_strides[0] % kSize == 0) &&
                       (params.heads == 1 || params.out_strides[1] % kSize == 0) &&
                       (params.q_length == 1 || params.out_strides[2] % kSize == 0);
  return (params.kv_length + (aligned ? kSize - 1 : 2 * kSize - 2)) / kSize;
}

/// The bits of `value` in every element of a pack.
template <typename T>
ATTN_MASK_INLINE Pack pack_of(uint64_t value) {
  uint64_t word = static_cast<T>(value);
  for (uint32_t bits = 8 * sizeof(T); bits < 64; bits *= 2) {
    word |= word << bits;
  }
  return {{word, word}};
}

/// The element at `index` of a pack.
template <typename T>
ATTN_MASK_INLINE T element_of(const Pack& pack, int64_t index) {
  const int64_t bit = index * 8 * static_cast<int64_t>(sizeof(T));
  return static_cast<T>((bit < 64 ? pack.words[0] : pack.words[1]) >> (bit % 64));
}

/// An element that is attended to.
template <typename T>
ATTN_MASK_INLINE T visible_element(const MaskParams& params, const Query& query, int64_t column) {
  const Bias& bias = params.bias;
  if (bias.data == nullptr) {
    return static_cast<T>(params.format.attend);
  }
  return static_cast<const T*>(
      bias.data)[query.batch * bias.strides[0] + query.head * bias.strides[1] +
                 query.row * bias.strides[2] + column * bias.strides[3]];
}

/// One element of a mask, of a row that sees no key but `keys`, and all of them if `exact`.
template <typename T>
ATTN_MASK_INLINE T mask_element(const MaskParams& params, const Query& query, Interval keys,
                                bool exact, int64_t column) {
  const Key key = params.key(query.batch, column);
  if (!keys.contains(key.position) || !(exact || attends(params.rule, query, key))) {
    return static_cast<T>(params.format.masked);
  }
  return visible_element<T>(params, query, column);
}

/// Elements `columns` of a row, which begins at column `first` of the pack.
template <typename T>
ATTN_MASK_INLINE Pack mask_pack(const MaskParams& params, const Hull& hull, const Query& query,
                                bool unmasked, int64_t first, Interval columns) {
  if (unmasked && params.bias.data == nullptr) {
    return pack_of<T>(params.unmasking.value);
  }
  const Interval keys = unmasked ? kEverywhere : hull.keys(params.rule, query);
  const bool exact = unmasked || hull.is_exact();
  if (!unmasked && !params.kv_positions.listed) {
    // Most packs lie on one side of the hull's border.
    const int64_t shift = params.kv_positions.at(query.batch, 0);
    const Interval inside = intersect(columns, {keys.begin - shift, keys.end - shift});
    if (inside.empty()) {
      return pack_of<T>(params.format.masked);
    }
    if (exact && params.bias.data == nullptr && inside.begin == columns.begin &&
        inside.end == columns.end) {
      return pack_of<T>(params.format.attend);
    }
  }
  Pack pack{{0, 0}};
  ATTN_MASK_ONE_BY_ONE
  for (int64_t column = columns.begin; column < columns.end; ++column) {
    const int64_t bit = (column - first) * 8 * static_cast<int64_t>(sizeof(T));
    const uint64_t value =
        static_cast<uint64_t>(mask_element<T>(params, query, keys, exact, column)) << (bit % 64);
    pack.words[0] |= bit < 64 ? value : 0;
    pack.words[1] |= bit < 64 ? 0 : value;
  }
  return pack;
}

template <typename T>
ATTN_MASK_INLINE void write_mask_body(const MaskParams& params, int64_t packs_per_row,
                                      const GridPosition& at) {
  const int64_t packs = params.rows() * packs_per_row;
  const Hull hull(params.rule);
  for (int64_t index = at.first(); index < packs; index += at.step()) {
    const int64_t row_index = index / packs_per_row;
    const int64_t plane = row_index / params.q_length;
    const Query query = params.query(plane, row_index - plane * params.q_length);
    T* const out = static_cast<T*>(params.out) + params.out_offset(query);
    const auto past_pack =
        static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % sizeof(Pack) / sizeof(T));
    const int64_t first = (index - row_index * packs_per_row) * kPackSize<T> - past_pack;
    const Interval columns = intersect({first, first + kPackSize<T>}, {0, params.kv_length});
    if (columns.empty()) {
      continue;
    }
    const Pack pack = mask_pack<T>(params, hull, query, params.unmasks(row_index), first, columns);
    if (columns.end - columns.begin == kPackSize<T> && params.out_strides[3] == 1) {
      *reinterpret_cast<Pack*>(out + first) = pack;
      continue;
    }
    ATTN_MASK_ONE_BY_ONE
    for (int64_t column = columns.begin; column < columns.end; ++column) {
      out[column * params.out_strides[3]] = element_of<T>(pack, column - first);
    }
  }
}

/// The part of `length` items that thread `thread` of `threads` goes through.
ATTN_MASK_INLINE Interval part_of(int64_t length, int64_t thread, int64_t threads) {
  const int64_t size = (length + threads - 1) / threads;
  return intersect({thread * size, (thread + 1) * size}, {0, length});
}

/// Whether one thread of the block that has a row of the mask finds a key visible in it.
ATTN_MASK_INLINE bool any_visible_body(const Problem& problem, int64_t row_index, int64_t thread,
                                       int64_t threads) {
  const int64_t plane = row_index / problem.q_length;
  const Query query = problem.query(plane, row_index - plane * problem.q_length);
  const Hull hull(problem.rule);
  Interval columns{0, problem.kv_length};
  if (!problem.kv_positions.listed) {
    const Interval keys = hull.keys(problem.rule, query);
    const int64_t shift = problem.kv_positions.at(query.batch, 0);
    columns = intersect(columns, {keys.begin - shift, keys.end - shift});
    if (hull.is_exact()) {
      return !columns.empty();
    }
  }
  ATTN_MASK_ONE_BY_ONE
  for (int64_t column = columns.begin + thread; column < columns.end; column += threads) {
    if (attends(problem.rule, query, problem.key(query.batch, column))) {
      return true;
    }
  }
  return false;
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
    const Pack keep_pack = pack_of<T>(keep);
    for (int64_t i = thread; i < split.packs; i += threads) {
      Pack pack = reinterpret_cast<const Pack*>(in + split.before)[i];
      pack.words[0] &= keep_pack.words[0];
      pack.words[1] &= keep_pack.words[1];
      reinterpret_cast<Pack*>(out + split.before)[i] = pack;
    }
  }
};

}  // namespace attn_mask
