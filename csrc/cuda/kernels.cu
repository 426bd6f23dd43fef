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
    write_mask_kernel(const MaskParams params, int64_t packs_per_row) {
  write_mask_body<T>(params, packs_per_row, grid_position());
}

// One block to a row of the mask.
__global__ void __launch_bounds__(kThreadsPerBlock)
    find_masked_rows_kernel(const Problem problem, uint8_t* masked) {
  const int64_t rows = problem.rows();
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const bool visible =
        __syncthreads_or(any_visible_body(problem, row, threadIdx.x, blockDim.x)) != 0;
    if (threadIdx.x == 0) {
      masked[row] = visible ? 0 : 1;
    }
  }
}

// One block to a row.
template <typename T>
__global__ void __launch_bounds__(kThreadsPerBlock) unmask_kernel(const UnmaskParams params) {
  const int64_t rows = params.in.rows();
  for (int64_t index = blockIdx.x; index < rows; index += gridDim.x) {
    const UnmaskRow<T> row(params, index);
    const bool attended = __syncthreads_or(row.attended_body(threadIdx.x, blockDim.x)) != 0;
    row.write_body(!attended, threadIdx.x, blockDim.x);
  }
}

// One block of threads to a line of blocks.
__global__ void __launch_bounds__(kThreadsPerBlock, 3)
    find_block_states_kernel(const BlockMaskParams params) {
  const int64_t kv_blocks = params.kv_blocks();
  const int64_t lines = params.planes() * params.q_blocks();
  for (int64_t line = blockIdx.x; line < lines; line += gridDim.x) {
    guess_line_body(params, line, threadIdx.x, blockDim.x);
    __syncthreads();
    for (int64_t block = 0; block < kv_blocks; ++block) {
      // Known ones stay as they are: of an unknown one all threads have read that before the
      // barrier.
      const int64_t index = line * kv_blocks + block;
      if (params.states[index] != BlockState::kUnknown) {
        continue;
      }
      const BlockContent found = evaluate_block_body(params, line, block, threadIdx.x, blockDim.x);
      const bool some = __syncthreads_or(found.some) != 0;
      const bool all = __syncthreads_and(found.all) != 0;
      if (threadIdx.x == 0) {
        params.states[index] = state_of(some, all);
      }
    }
  }
}

// One block of threads to a line that is to be listed.
__global__ void __launch_bounds__(kThreadsPerBlock, 3)
    write_block_mask_kernel(const BlockMaskParams params) {
  __shared__ int64_t counts[kThreadsPerBlock];
  const int64_t thread = threadIdx.x;
  const int64_t lines = listed_lines(params);
  for (int64_t index = blockIdx.x; index < lines; index += gridDim.x) {
    const ListedLine line = listed_line(params, index);
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
void launch_write_mask(const MaskParams& params, cudaStream_t stream) {
  const int64_t per_row = packs_per_row<T>(params);
  const auto blocks = static_cast<unsigned int>(blocks_for(params.rows() * per_row));
  write_mask_kernel<T><<<blocks, kThreadsPerBlock, 0, stream>>>(params, per_row);
}

template <typename T>
void launch_unmask(const UnmaskParams& params, cudaStream_t stream) {
  const int64_t rows = params.in.rows();
  const auto blocks = static_cast<unsigned int>(rows < kMaxRowBlocks ? rows : kMaxRowBlocks);
  const auto threads =
      static_cast<unsigned int>(threads_for_row(params.in.length / kPackSize<T> + 1));
  unmask_kernel<T><<<blocks, threads, 0, stream>>>(params);
}

}  // namespace

void launch_write_mask(const MaskParams& params, cudaStream_t stream) {
  with_bits(params.format.element_size,
            [&](auto bits) { launch_write_mask<decltype(bits)>(params, stream); });
}

void launch_find_masked_rows(const Problem& problem, uint8_t* rows, cudaStream_t stream) {
  const auto threads = static_cast<unsigned int>(threads_for_row(problem.kv_length));
  find_masked_rows_kernel<<<blocks_for_lines(problem.rows()), threads, 0, stream>>>(problem, rows);
}

void launch_find_block_states(const BlockMaskParams& params, cudaStream_t stream) {
  find_block_states_kernel<<<blocks_for_lines(params.planes() * params.q_blocks()),
                             kThreadsPerBlock, 0, stream>>>(params);
}

void launch_write_block_mask(const BlockMaskParams& params, cudaStream_t stream) {
  write_block_mask_kernel<<<blocks_for_lines(listed_lines(params)), kThreadsPerBlock, 0, stream>>>(
      params);
}

void launch_unmask(const UnmaskParams& params, cudaStream_t stream) {
  with_bits(params.in.element_size,
            [&](auto bits) { launch_unmask<decltype(bits)>(params, stream); });
}

}  // namespace attn_mask
