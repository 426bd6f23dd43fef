#include "cpu/dispatch.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <algorithm>
#include <atomic>
#include <string>

namespace attn_mask {

void parallel_for(int64_t items, int64_t bytes_per_item,
                  const std::function<void(int64_t begin, int64_t end)>& f) {
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, bytes_per_item));
  at::parallel_for(0, items, grain, f);
}

int64_t threads() { return at::get_num_threads(); }

const CpuKernels& cpu_kernels() {
  static const CpuKernels& chosen = []() -> const CpuKernels& {
#if defined(ATTN_MASK_HAS_X86_KERNELS)
    // Torch's own choice, so that ATEN_CPU_CAPABILITY governs these kernels, too.
    const std::string capability = at::get_cpu_capability();
    if (capability.rfind("AVX512", 0) == 0) {
      return isa_avx512::kKernels;
    }
    if (capability == "AVX2") {
      return isa_avx2::kKernels;
    }
#endif
    return isa_default::kKernels;
  }();
  return chosen;
}

void write_mask_cpu(const MaskParams& params) {
  const int64_t keys = std::min(params.kv_length, kTileBytes / params.format.element_size);
  const Tiling tiling{keys, (params.kv_length + keys - 1) / keys};
  parallel_for(
      params.rows() * tiling.per_row, keys * params.format.element_size,
      [&](int64_t begin, int64_t end) { cpu_kernels().write_tiles(params, tiling, begin, end); });
}

void find_masked_rows_cpu(const Problem& problem, uint8_t* rows) {
  // In most rows one of the first keys that are read is visible.
  constexpr int64_t kBytesOfRow = 256;
  parallel_for(problem.rows(), kBytesOfRow, [&](int64_t begin, int64_t end) {
    cpu_kernels().find_masked_rows(problem, begin, end, rows);
  });
}

void unmask_cpu(const UnmaskParams& params) {
  if (params.in.rows() == 0 || params.in.length == 0) {
    return;
  }
  parallel_for(params.in.rows(), params.in.length * params.in.element_size,
               [&](int64_t begin, int64_t end) { cpu_kernels().unmask_rows(params, begin, end); });
}

bool all_cpu(const StridedRows& rows, const KeyTest& test) {
  // Cut rows into pieces, too: one long row must be shared among threads, and every piece is a
  // chance to see that another thread has found a miss.
  const int64_t piece = std::max<int64_t>(1, kGrainBytes / rows.element_size);
  const int64_t per_row = (rows.length + piece - 1) / piece;
  std::atomic<bool> is_all{true};
  const auto visit = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end && is_all.load(std::memory_order_relaxed); ++i) {
      const int64_t first = i % per_row * piece;
      const int64_t last = std::min(first + piece, rows.length);
      if (!cpu_kernels().all(rows, test, i / per_row, first, last)) {
        is_all.store(false, std::memory_order_relaxed);
      }
    }
  };
  // A thread that searches for a miss does so in little time.
  parallel_for(rows.rows() * per_row, std::min(piece, rows.length) * rows.element_size / 8, visit);
  return is_all.load(std::memory_order_relaxed);
}

}  // namespace attn_mask
