#include "cpu/parallel.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <algorithm>
#include <atomic>

namespace attn_mask {
namespace {

// Waking a second thread costs as much as writing about this much.
constexpr int64_t kGrainBytes = 128 * 1024;

}  // namespace

int64_t grain_of(int64_t bytes_per_item) {
  return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, bytes_per_item));
}

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

void write_mask_cpu(const MaskTask& task) {
  const int64_t keys = std::min(task.kv_length, kTileBytes / task.format.element_size);
  const Tiling tiling{keys, (task.kv_length + keys - 1) / keys};
  at::parallel_for(
      0, task.rows() * tiling.per_row, grain_of(keys * task.format.element_size),
      [&](int64_t begin, int64_t end) { cpu_kernels().write_tiles(task, tiling, begin, end); });
}

void find_masked_rows_cpu(const Question& question, uint8_t* rows) {
  // Most rows show one of the first keys that are looked at.
  constexpr int64_t kBytesOfRow = 256;
  at::parallel_for(0, question.rows(), grain_of(kBytesOfRow), [&](int64_t begin, int64_t end) {
    cpu_kernels().find_masked_rows(question, begin, end, rows);
  });
}

void unmask_cpu(const UnmaskTask& task) {
  if (task.in.rows() == 0 || task.in.length == 0) {
    return;
  }
  at::parallel_for(
      0, task.in.rows(), grain_of(task.in.length * task.in.element_size),
      [&](int64_t begin, int64_t end) { cpu_kernels().unmask_rows(task, begin, end); });
}

bool all_cpu(const StridedRows& rows, const KeyTest& test) {
  // Cut rows into pieces, too: one long row must be shared among threads, and every piece is a
  // chance to see that another thread has found a miss.
  const int64_t piece = std::max<int64_t>(1, kGrainBytes / rows.element_size);
  const int64_t per_row = (rows.length + piece - 1) / piece;
  std::atomic<bool> answer{true};
  at::parallel_for(0, rows.rows() * per_row,
                   8 * grain_of(std::min(piece, rows.length) * rows.element_size),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       if (!answer.load(std::memory_order_relaxed)) {
                         return;
                       }
                       const int64_t first = i % per_row * piece;
                       const int64_t last = std::min(first + piece, rows.length);
                       if (!cpu_kernels().all(rows, test, i / per_row, first, last)) {
                         answer.store(false, std::memory_order_relaxed);
                       }
                     }
                   });
  return answer.load(std::memory_order_relaxed);
}

}  // namespace attn_mask
