#include "bits.h"
#include "cpu/isa.h"

namespace attn_mask::ATTN_MASK_ISA {
namespace {

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
void unmask_rows(const UnmaskParams& params, int64_t begin, int64_t end) {
  const int64_t n = params.in.length;
  const int64_t stride = params.in.stride;
  const T sign = static_cast<T>(params.sign);
  for (int64_t row = begin; row < end; ++row) {
    const T* in = static_cast<const T*>(params.in.data) + params.in.row_offset(row);
    T* out = static_cast<T*>(params.written) + params.out.row_offset(row);
    const int64_t out_stride = params.out.stride;
    if (all(in, stride, n, params.is_min)) {
      for (int64_t i = 0; i < n; ++i) {
        out[i * out_stride] = in[i * stride] & sign;
      }
    } else if (stride == 1 && out_stride == 1) {
      if (out != in) {
        __builtin_memcpy(out, in, static_cast<std::size_t>(n) * sizeof(T));
      }
    } else {
      for (int64_t i = 0; i < n; ++i) {
        out[i * out_stride] = in[i * stride];
      }
    }
  }
}

}  // namespace

void unmask_rows(const UnmaskParams& params, int64_t begin, int64_t end) {
  with_bits(params.in.element_size,
            [&](auto bits) { unmask_rows<decltype(bits)>(params, begin, end); });
}

bool all(const StridedRows& rows, const KeyTest& test, int64_t row, int64_t begin, int64_t end) {
  const int64_t offset = rows.row_offset(row) + begin * rows.stride;
  return with_bits(rows.element_size, [&](auto bits) {
    return all(static_cast<const decltype(bits)*>(rows.data) + offset, rows.stride, end - begin,
               test);
  });
}

}  // namespace attn_mask::ATTN_MASK_ISA
