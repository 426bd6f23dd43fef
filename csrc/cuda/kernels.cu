// Thin shells around the bodies. No ATen header: this file compiles in seconds.

#include "bits.h"
#include "cuda/block_mask_bodies.h"
#include "cuda/bodies.h"
#include "cuda/launch.h"

namespace attn_mask {
namespace {

__device__ GridPosition grid_position() { return {blockIdx.x, threadIdx.x, gridDim.x, blockDim.x}; }

template <typename T>
__global__ void __launch_bounds__(kThreadsPerBlock, 3)  // more at once, and registers would spill
    write_mask_kernel(const MaskTask task, int64_t packs_per_row) {
  write_mask_body<T>(task, packs_per_row, grid_position());
}

// One block to a row of the mask.
__global__ void __launch_bounds__(kThreadsPerBlock)
    find_masked_rows_kernel(const Question question, uint8_t* masked) {
  const int64_t rows = question.rows();
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const bool visible =
        __syncthreads_or(any_visible_body(question, row, threadIdx.x, blockDim.x)) != 0;
    if (threadIdx.x == 0) {
      masked[row] = visible ? 0 : 1;
    }
  }
}

// One block to a row.
template <typename T>
__global__ void __launch_bounds__(kThreadsPerBlock) unmask_kernel(const UnmaskTask task) {
  const int64_t rows = task.in.rows();
  for (int64_t index = blockIdx.x; index < rows; index += gridDim.x) {
    const UnmaskRow<T> row(task, index);
    const bool attended = __syncthreads_or(row.attended_body(threadIdx.x, blockDim.x)) != 0;
    row.write_body(!attended, threadIdx.x, blockDim.x);
  }
}

// One block of threads to a line of blocks.
__global__ void __launch_bounds__(kThreadsPerBlock, 3)
    find_block_states_kernel(const BlockMaskTask task) {
  const int64_t kv_blocks = task.kv_blocks();
  const int64_t lines = task.planes() * task.q_blocks();
  for (int64_t line = blockIdx.x; line < lines; line += gridDim.x) {
    guess_line_body(task, line, threadIdx.x, blockDim.x);
    __syncthreads();
    for (int64_t block = 0; block < kv_blocks; ++block) {
      // Known ones stay as they are: of an unknown one all threads have read that before the
      // barrier.
      const int64_t index = line * kv_blocks + block;
      if (task.states[index] != BlockState::kUnknown) {
        continue;
      }
      const BlockAnswer answer = ask_block_body(task, line, block, threadIdx.x, blockDim.x);
      const bool some = __syncthreads_or(answer.some) != 0;
      const bool all = __syncthreads_and(answer.all) != 0;
      if (threadIdx.x == 0) {
        task.states[index] = state_of(some, all);
      }
    }
  }
}

// One block of threads to a line that is to be listed.
__global__ void __launch_bounds__(kThreadsPerBlock, 3)
    write_block_mask_kernel(const BlockMaskTask task) {
  __shared__ int64_t counts[kThreadsPerBlock];
  const int64_t thread = threadIdx.x;
  const int64_t lines = listed_lines(task);
  for (int64_t index = blockIdx.x; index < lines; index += gridDim.x) {
    const ListedLine line = listed_line(task, index);
    const Interval part = part_of(line.total, thread, kThreadsPerBlock);
    counts[thread] = line.count_body(part);
    __syncthreads();
    if (!line.list_body(part, counts, thread, kThreadsPerBlock)) {
      __trap();  // a width that is too small would lose blocks
    }
    __syncthreads();
  }
}

unsigned int blocks_for_lines(int64_t lines) {
  return static_cast<unsigned int>(lines < kMaxRowBlocks ? lines : kMaxRowBlocks);
}

template <typename T>
void launch_write_mask(const MaskTask& task, cudaStream_t stream) {
  const int64_t per_row = packs_per_row<T>(task);
  const auto blocks = static_cast<unsigned int>(blocks_for(task.rows() * per_row));
  write_mask_kernel<T><<<blocks, kThreadsPerBlock, 0, stream>>>(task, per_row);
}

template <typename T>
void launch_unmask(const UnmaskTask& task, cudaStream_t stream) {
  const int64_t rows = task.in.rows();
  const auto blocks = static_cast<unsigned int>(rows < kMaxRowBlocks ? rows : kMaxRowBlocks);
  const auto threads =
      static_cast<unsigned int>(threads_for_row(task.in.length / kPackSize<T> + 1));
  unmask_kernel<T><<<blocks, threads, 0, stream>>>(task);
}

}  // namespace

void launch_write_mask(const MaskTask& task, cudaStream_t stream) {
  with_bits(task.format.element_size,
            [&](auto bits) { launch_write_mask<decltype(bits)>(task, stream); });
}

void launch_find_masked_rows(const Question& question, uint8_t* rows, cudaStream_t stream) {
  const auto threads = static_cast<unsigned int>(threads_for_row(question.kv_length));
  find_masked_rows_kernel<<<blocks_for_lines(question.rows()), threads, 0, stream>>>(question,
                                                                                     rows);
}

void launch_find_block_states(const BlockMaskTask& task, cudaStream_t stream) {
  find_block_states_kernel<<<blocks_for_lines(task.planes() * task.q_blocks()), kThreadsPerBlock, 0,
                             stream>>>(task);
}

void launch_write_block_mask(const BlockMaskTask& task, cudaStream_t stream) {
  write_block_mask_kernel<<<blocks_for_lines(listed_lines(task)), kThreadsPerBlock, 0, stream>>>(
      task);
}

void launch_unmask(const UnmaskTask& task, cudaStream_t stream) {
  with_bits(task.in.element_size, [&](auto bits) { launch_unmask<decltype(bits)>(task, stream); });
}

}  // namespace attn_mask
