#pragma once

// What one thread of each kernel does. No shared memory and no barrier, so that the same lines run
// under an emulated grid on the host.

#include "cuda/grid.h"
#include "format/mask_task.h"
#include "format/strided_rows.h"

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
inline int64_t packs_per_row(const MaskTask& task) {
  constexpr int64_t kSize = kPackSize<T>;
  const bool aligned = reinterpret_cast<uintptr_t>(task.out) % sizeof(Pack) == 0 &&
                       (task.batch_size == 1 || task.out_strides[0] % kSize == 0) &&
                       (task.heads == 1 || task.out_strides[1] % kSize == 0) &&
                       (task.q_length == 1 || task.out_strides[2] % kSize == 0);
  return (task.kv_length + (aligned ? kSize - 1 : 2 * kSize - 2)) / kSize;
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

/// One element of a mask.
template <typename T>
ATTN_MASK_INLINE T mask_element(const MaskTask& task, const Query& query, const RowHull& row,
                                int64_t column) {
  const Key key = task.key(query.batch, column);
  if (!row.positions.contains(key.position) || !(row.exact || attends(task.rule, query, key))) {
    return static_cast<T>(task.format.masked);
  }
  const Bias& bias = task.bias;
  if (bias.data == nullptr) {
    return static_cast<T>(task.format.attend);
  }
  return static_cast<const T*>(
      bias.data)[query.batch * bias.strides[0] + query.head * bias.strides[1] +
                 query.row * bias.strides[2] + column * bias.strides[3]];
}

/// Elements `columns` of a row, which begins at column `first` of the pack.
template <typename T>
ATTN_MASK_INLINE Pack mask_pack(const MaskTask& task, const Query& query, int64_t first,
                                Interval columns) {
  const RowHull row = row_hull(task.rule, query);
  if (!task.kv_positions.listed) {
    // Most packs lie on one side of the hull's border.
    const int64_t shift = task.kv_positions.at(query.batch, 0);
    const Interval inside =
        intersect(columns, {row.positions.begin - shift, row.positions.end - shift});
    if (inside.empty()) {
      return pack_of<T>(task.format.masked);
    }
    if (row.exact && task.bias.data == nullptr && inside.begin == columns.begin &&
        inside.end == columns.end) {
      return pack_of<T>(task.format.attend);
    }
  }
  Pack pack{{0, 0}};
  // A loop that is not unrolled: sixteen copies of the rule's evaluation would spill registers.
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
  for (int64_t column = columns.begin; column < columns.end; ++column) {
    const int64_t bit = (column - first) * 8 * static_cast<int64_t>(sizeof(T));
    const uint64_t value = static_cast<uint64_t>(mask_element<T>(task, query, row, column))
                           << (bit % 64);
    pack.words[0] |= bit < 64 ? value : 0;
    pack.words[1] |= bit < 64 ? 0 : value;
  }
  return pack;
}

template <typename T>
ATTN_MASK_INLINE void write_mask_body(const MaskTask& task, int64_t packs_per_row,
                                      const GridPosition& at) {
  const int64_t packs = task.rows() * packs_per_row;
  for (int64_t index = at.first(); index < packs; index += at.step()) {
    const int64_t row_index = index / packs_per_row;
    const int64_t plane = row_index / task.q_length;
    const Query query = task.query(plane, row_index - plane * task.q_length);
    T* const out = static_cast<T*>(task.out) + task.out_offset(query);
    const auto past_pack =
        static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % sizeof(Pack) / sizeof(T));
    const int64_t first = (index - row_index * packs_per_row) * kPackSize<T> - past_pack;
    const Interval columns = intersect({first, first + kPackSize<T>}, {0, task.kv_length});
    if (columns.empty()) {
      continue;
    }
    const Pack pack = mask_pack<T>(task, query, first, columns);
    if (columns.end - columns.begin == kPackSize<T> && task.out_strides[3] == 1) {
      *reinterpret_cast<Pack*>(out + first) = pack;
      continue;
    }
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
    for (int64_t column = columns.begin; column < columns.end; ++column) {
      const int64_t bit = (column - first) * 8 * static_cast<int64_t>(sizeof(T));
      out[column * task.out_strides[3]] =
          static_cast<T>((bit < 64 ? pack.words[0] : pack.words[1]) >> (bit % 64));
    }
  }
}

/// Sets `attended[row]` for each row that doesn't hold the minimum throughout. Threads that agree
/// write the same byte. `attended` is zero before.
template <typename T>
ATTN_MASK_INLINE void find_attended_rows_body(const UnmaskTask& task, uint8_t* attended,
                                              const GridPosition& at) {
  const T* in = static_cast<const T*>(task.in.data);
  const int64_t elements = task.in.rows() * task.in.length;
  for (int64_t element = at.first(); element < elements; element += at.step()) {
    const int64_t row = element / task.in.length;
    const int64_t key = element - row * task.in.length;
    if (!task.is_min(in[task.in.row_offset(row) + key * task.in.stride])) {
      attended[row] = 1;
    }
  }
}

/// Copies rows, opening those that nothing is attended to in.
template <typename T>
ATTN_MASK_INLINE void unmask_body(const UnmaskTask& task, const uint8_t* attended,
                                  const GridPosition& at) {
  const T* in = static_cast<const T*>(task.in.data);
  const int64_t elements = task.in.rows() * task.in.length;
  for (int64_t element = at.first(); element < elements; element += at.step()) {
    const int64_t row = element / task.in.length;
    const int64_t key = element - row * task.in.length;
    const T value = in[task.in.row_offset(row) + key * task.in.stride];
    static_cast<T*>(task.out)[element] =
        attended[row] != 0 ? value : static_cast<T>(value & static_cast<T>(task.sign));
  }
}

}  // namespace attn_mask
