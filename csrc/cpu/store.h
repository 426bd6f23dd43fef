#pragma once

#include <cstddef>
#include <cstdint>

namespace attn_mask::ATTN_MASK_ISA {

/// Intervals begin anywhere in a row, and a vector store across two cache lines costs as much as
/// two: all stores but the first and the last are aligned. `line_at(i)` gives the line of elements
/// from element i on, and must do so for the last line of the n elements, too.
template <typename T, typename LineAt>
void store_lines(T* out, int64_t n, LineAt line_at) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const auto store = [&](T* to, int64_t i) { __builtin_memcpy(to, line_at(i), 64); };
  const auto past_line = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % 64 / sizeof(T));
  const int64_t head = kLine - past_line;
  T* aligned = static_cast<T*>(__builtin_assume_aligned(out + head, 64));
  const int64_t lines = (n - head) / kLine;
  store(out, 0);
  for (int64_t i = 0; i < lines; ++i) {
    store(aligned + i * kLine, head + i * kLine);
  }
  store(out + n - kLine, n - kLine);
}

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
  store_lines(out, n, [&](int64_t) { return line; });
}

/// For rows as short as ours memcpy takes twice as long.
template <typename T>
void copy(const T* in, int64_t n, T* out) {
  constexpr int64_t kLine = 64 / sizeof(T);
  if (n < kLine) {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = in[i];
    }
    return;
  }
  store_lines(out, n, [&](int64_t i) { return in + i; });
}

}  // namespace attn_mask::ATTN_MASK_ISA
