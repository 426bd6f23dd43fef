// Compiled once per instruction set, with ATTN_MASK_ISA naming the namespace. It includes no header
// whose inline functions might be emitted here and then be shared with code for older processors.

#include "cpu/kernels.h"

#include <cstddef>

namespace attn_mask::ATTN_MASK_ISA {
namespace {

/// Intervals begin anywhere in a row, and a vector store across two cache lines costs as much as
/// two: all stores but the first and the last are aligned.
template <typename T>
void fill(T* out, int64_t n, T value) {
  constexpr int64_t kLine = 64 / sizeof(T);
  if (n < kLine) {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = value;
    }
    return;
  }
  alignas(64) T line[kLine];
  for (T& element : line) {
    element = value;
  }
  __builtin_memcpy(out, line, sizeof(line));
  __builtin_memcpy(out + n - kLine, line, sizeof(line));
  const auto past_line = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % 64 / sizeof(T));
  T* aligned = static_cast<T*>(__builtin_assume_aligned(out + (kLine - past_line), 64));
  const int64_t lines = (n - (kLine - past_line)) / kLine;
  for (int64_t i = 0; i < lines; ++i) {
    __builtin_memcpy(aligned + i * kLine, line, sizeof(line));
  }
}

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

/// Writes what the padding says of keys `[begin, end)` to `out`.
template <typename Out>
void translate(const Padding& padding, const Query& query, int64_t begin, int64_t end, Out attend,
               Out masked, Out* out) {
  const int64_t offset = padding.row_offset(query) + begin * padding.key_stride;
  const auto run = [&](auto* mask) {
    translate(mask + offset, padding.key_stride, end - begin, padding.visible, attend, masked, out);
  };
  switch (padding.element_size) {
    case 1:
      return run(static_cast<const uint8_t*>(padding.mask));
    case 2:
      return run(static_cast<const uint16_t*>(padding.mask));
    case 4:
      return run(static_cast<const uint32_t*>(padding.mask));
    default:
      return run(static_cast<const uint64_t*>(padding.mask));
  }
}

/// The padding leaf when it is the only leaf of `row` that has to be asked key by key, else null.
const Padding* sole_padding(const Rule& rule, const RowSpan& row) {
  for (int32_t i = 0; i < rule.size; ++i) {
    if (row.unresolved == 1U << i) {
      return &rule.leaves[i].padding;
    }
  }
  return nullptr;
}

template <typename Out>
void write_tiles(const MaskTask& task, const Tiling& tiling, int64_t begin, int64_t end) {
  const Out attend = static_cast<Out>(task.format.attend);
  const Out masked = static_cast<Out>(task.format.masked);
  // What the padding says of the keys of one tile, the same for every query of its batch row.
  alignas(64) Out padding_tile[kTileBytes / sizeof(Out)];
  int64_t padding_tile_of = -1;

  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t row_in_batch = tile % task.q_length;
    const int64_t column = tile / task.q_length;  // counts on through the batch
    const int64_t batch = column / tiling.per_row;
    const int64_t first = column % tiling.per_row * tiling.keys;
    const int64_t last =
        first + tiling.keys < task.kv_length ? first + tiling.keys : task.kv_length;
    const Query query{batch, row_in_batch, task.q_offset + row_in_batch};
    const RowSpan row = row_span(task.rule, query, task.kv_length);
    const Interval keys = intersect(row.interval, {first, last});
    Out* out = static_cast<Out*>(task.out) +
               (batch * task.q_length + row_in_batch) * task.kv_length;  // [kv]
    if (keys.empty()) {
      fill(out + first, last - first, masked);
      continue;
    }
    // From left to right: the other order takes twice as long, since hardware prefetches forwards.
    fill(out + first, keys.begin - first, masked);
    const Padding* padding = sole_padding(task.rule, row);
    if (row.unresolved == 0) {
      fill(out + keys.begin, keys.end - keys.begin, attend);
    } else if (padding == nullptr) {
      for (int64_t key = keys.begin; key < keys.end; ++key) {
        out[key] = attends(task.rule, query, key, row.unresolved) ? attend : masked;
      }
    } else if (padding->q_stride != 0 || task.q_length == 1) {
      translate(*padding, query, keys.begin, keys.end, attend, masked, out + keys.begin);
    } else {
      if (padding_tile_of != column) {
        translate(*padding, query, first, last, attend, masked, padding_tile);
        padding_tile_of = column;
      }
      __builtin_memcpy(out + keys.begin, padding_tile + (keys.begin - first),
                       static_cast<std::size_t>(keys.end - keys.begin) * sizeof(Out));
    }
    fill(out + keys.end, last - keys.end, masked);
  }
}

void write_tiles(const MaskTask& task, const Tiling& tiling, int64_t begin, int64_t end) {
  switch (task.format.element_size) {
    case 1:
      return write_tiles<uint8_t>(task, tiling, begin, end);
    case 2:
      return write_tiles<uint16_t>(task, tiling, begin, end);
    case 4:
      return write_tiles<uint32_t>(task, tiling, begin, end);
    default:
      return write_tiles<uint64_t>(task, tiling, begin, end);
  }
}

template <typename T>
bool all(const T* row, int64_t stride, int64_t n, KeyTest test) {
  // Blocks without a branch inside vectorise; between them a miss ends the search.
  constexpr int64_t kBlock = 512;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    T misses = 0;
    if (stride == 1) {
      for (int64_t i = begin; i < end; ++i) {
        misses |= static_cast<T>(!test(row[i]));
      }
    } else {
      for (int64_t i = begin; i < end; ++i) {
        misses |= static_cast<T>(!test(row[i * stride]));
      }
    }
    if (misses != 0) {
      return false;
    }
  }
  return true;
}

template <typename T>
void unmask_rows(const UnmaskTask& task, int64_t begin, int64_t end) {
  const int64_t n = task.in.length;
  const int64_t stride = task.in.stride;
  const T sign = static_cast<T>(task.sign);
  for (int64_t row = begin; row < end; ++row) {
    const T* in = static_cast<const T*>(task.in.data) + task.in.row_offset(row);
    T* out = static_cast<T*>(task.out) + row * n;
    if (all(in, stride, n, task.is_min)) {
      for (int64_t i = 0; i < n; ++i) {
        out[i] = in[i * stride] & sign;
      }
    } else if (stride == 1) {
      __builtin_memcpy(out, in, static_cast<std::size_t>(n) * sizeof(T));
    } else {
      for (int64_t i = 0; i < n; ++i) {
        out[i] = in[i * stride];
      }
    }
  }
}

void unmask_rows(const UnmaskTask& task, int64_t begin, int64_t end) {
  switch (task.in.element_size) {
    case 1:
      return unmask_rows<uint8_t>(task, begin, end);
    case 2:
      return unmask_rows<uint16_t>(task, begin, end);
    case 4:
      return unmask_rows<uint32_t>(task, begin, end);
    default:
      return unmask_rows<uint64_t>(task, begin, end);
  }
}

bool all(const StridedRows& rows, const KeyTest& test, int64_t row, int64_t begin, int64_t end) {
  const int64_t offset = rows.row_offset(row) + begin * rows.stride;
  const auto run = [&](auto* data) { return all(data + offset, rows.stride, end - begin, test); };
  switch (rows.element_size) {
    case 1:
      return run(static_cast<const uint8_t*>(rows.data));
    case 2:
      return run(static_cast<const uint16_t*>(rows.data));
    case 4:
      return run(static_cast<const uint32_t*>(rows.data));
    default:
      return run(static_cast<const uint64_t*>(rows.data));
  }
}

}  // namespace

const CpuKernels kKernels = {&write_tiles, &unmask_rows, &all};

}  // namespace attn_mask::ATTN_MASK_ISA
