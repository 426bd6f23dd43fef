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

/// Stores of a mask as a whole: packs run on across the ends of rows, so that all but the last are
/// full and aligned whatever the row's length.
template <typename T>
ATTN_MASK_INLINE int64_t mask_packs(const MaskTask& task) {
  const int64_t elements = task.elements();
  return elements / kPackSize<T> + (elements % kPackSize<T> != 0);
}

/// Walks over the elements of a mask in the order of memory.
struct MaskCursor {
  const MaskTask& task;
  int64_t row_index;  // counts on through heads and batch
  int64_t column;
  Query query{};
  RowHull row{};

  ATTN_MASK_INLINE MaskCursor(const MaskTask& of, int64_t element)
      : task(of), row_index(element / of.kv_length), column(element % of.kv_length) {
    enter_row();
  }

  ATTN_MASK_INLINE void enter_row() {
    const int64_t plane = row_index / task.q_length;
    query = task.query(plane, row_index - plane * task.q_length);
    row = row_hull(task.rule, query);
  }

  template <typename T>
  ATTN_MASK_INLINE T value() const {
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

  /// To the next element, which must exist.
  ATTN_MASK_INLINE void advance() {
    if (++column == task.kv_length) {
      column = 0;
      ++row_index;
      enter_row();
    }
  }
};

template <typename T>
ATTN_MASK_INLINE void write_mask_body(const MaskTask& task, const GridPosition& at) {
  const int64_t elements = task.elements();
  const int64_t packs = mask_packs<T>(task);
  for (int64_t pack_index = at.first(); pack_index < packs; pack_index += at.step()) {
    const int64_t first = pack_index * kPackSize<T>;
    const int64_t left = elements - first;
    const int64_t count = left < kPackSize<T> ? left : kPackSize<T>;
    MaskCursor cursor(task, first);
    Pack pack{{0, 0}};
    // A loop that is not unrolled: sixteen copies of the rule's evaluation would spill registers.
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
    for (int64_t i = 0; i < count; ++i) {
      if (i > 0) {
        cursor.advance();
      }
      const int64_t bit = i * 8 * static_cast<int64_t>(sizeof(T));
      const uint64_t value = static_cast<uint64_t>(cursor.template value<T>()) << (bit % 64);
      pack.words[0] |= bit < 64 ? value : 0;
      pack.words[1] |= bit < 64 ? 0 : value;
    }
    T* out = static_cast<T*>(task.out) + first;
    if (count == kPackSize<T>) {
      *reinterpret_cast<Pack*>(out) = pack;
    } else {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t bit = i * 8 * static_cast<int64_t>(sizeof(T));
        out[i] = static_cast<T>((bit < 64 ? pack.words[0] : pack.words[1]) >> (bit % 64));
      }
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
