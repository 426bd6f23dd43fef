#pragma once

// What one thread of each kernel does. No shared memory and no barrier, so that the same lines run
// under an emulated grid on the host.

#include "cuda/grid.h"
#include "format/mask_task.h"
#include "format/strided_rows.h"

namespace attn_mask {

/// One 16-byte store.
template <typename T>
struct alignas(16) Pack {
  static constexpr int64_t kSize = 16 / sizeof(T);
  T values[kSize];
};

/// Stores of a mask as a whole: packs run on across the ends of rows, so that all but the last are
/// full and aligned whatever the row's length.
template <typename T>
ATTN_MASK_INLINE int64_t mask_packs(const MaskTask& task) {
  const int64_t elements = task.batch_size * task.q_length * task.kv_length;
  return elements / Pack<T>::kSize + (elements % Pack<T>::kSize != 0);
}

template <typename T>
ATTN_MASK_INLINE void write_mask_body(const MaskTask& task, const GridPosition& at) {
  const T attend = static_cast<T>(task.format.attend);
  const T masked = static_cast<T>(task.format.masked);
  const int64_t elements = task.batch_size * task.q_length * task.kv_length;
  const int64_t packs = mask_packs<T>(task);
  for (int64_t pack_index = at.first(); pack_index < packs; pack_index += at.step()) {
    const int64_t first = pack_index * Pack<T>::kSize;
    int64_t row_index = first / task.kv_length;
    int64_t key = first - row_index * task.kv_length;
    Query query{};
    RowSpan row{};
    bool new_row = true;
    Pack<T> pack;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int64_t i = 0; i < Pack<T>::kSize; ++i) {
      if (new_row) {
        query.batch = row_index / task.q_length;
        query.row = row_index - query.batch * task.q_length;
        query.position = task.q_offset + query.row;
        row = row_span(task.rule, query, task.kv_length);
        new_row = false;
      }
      const bool inside = first + i < elements && row.interval.contains(key);
      pack.values[i] = inside && attends(task.rule, query, key, row.unresolved) ? attend : masked;
      if (++key == task.kv_length) {
        key = 0;
        ++row_index;
        new_row = true;
      }
    }
    T* out = static_cast<T*>(task.out) + first;
    if (first + Pack<T>::kSize <= elements) {
      *reinterpret_cast<Pack<T>*>(out) = pack;
    } else {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
      for (int64_t i = 0; i < Pack<T>::kSize; ++i) {
        if (first + i < elements) {
          out[i] = pack.values[i];
        }
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
