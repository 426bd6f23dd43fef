// Thin shells around the bodies. No ATen header: this file compiles in seconds.

#include "bits.h"
#include "cuda/block_mask_bodies.h"
#include "cuda/bodies.h"
#include "cuda/launch.h"
#include "cuda/mask_bodies.h"
#include "cuda/prepare_bodies.h"

namespace attn_mask {
namespace {

// A warp takes rows, block y a part of each.
template <typename T>
__global__ void __launch_bounds__(kThreadsPerBlock, 3)
    write_mask_kernel(const __grid_constant__ MaskLaunch launch) {
  extern __shared__ uint64_t shared[];
  const int64_t warps = blockDim.x / kLanes;
  const int64_t warp = threadIdx.x / kLanes;
  const int64_t lane = threadIdx.x % kLanes;
  uint64_t* const words = shared + warp * kLanes;
  const WordStack stack{shared + blockDim.x + threadIdx.x, blockDim.x};
  const Interval part = intersect(
      {blockIdx.y * launch.per_part, (blockIdx.y + 1) * launch.per_part}, {0, launch.groups});
  const int64_t rows = launch.params.rows();
  for (int64_t row = blockIdx.x * warps + warp; row < rows; row += gridDim.x * warps) {
    RowWriter<T> writer(launch, row);
    if (launch.params.unmasking.wanted) {
      bool visible = false;
      for (int64_t group = 0; group < launch.groups && !visible; ++group) {
        visible = __any_sync(~0U, writer.word(group, lane, stack) != 0) != 0;
      }
      if (!visible) {
        writer.unmask();
      }
    }
    for (int64_t group = part.begin; group < part.end; ++group) {
      const uint64_t word = writer.word(group, lane, stack);
      if (launch.by_words) {
        words[lane] = word;
        __syncwarp();
        writer.write_packs(group, lane, words);
        __syncwarp();
      } else {
        writer.write_pack(group * kLanes + lane, static_cast<uint32_t>(word));
      }
    }
  }
}

// The lanes' bits of a warp's positions, as words; lane i has word i, those from kPerLane on none.
__device__ uint32_t transpose(uint32_t of_lane) {
  uint32_t mine = 0;
  for (int32_t i = 0; i < kPerLane; ++i) {
    const uint32_t word = __ballot_sync(~0U, of_lane >> i & 1U);
    mine = threadIdx.x % kLanes == i ? word : mine;
  }
  return mine;
}

// The head that comes first on the way from a part, in direction `step`; by one warp.
__device__ int64_t nearest_head(const RowRuns& runs, int64_t part, int64_t step, int64_t none) {
  const auto lane = static_cast<int64_t>(threadIdx.x % kLanes);
  const int64_t parts = runs.job.parts();
  const volatile uint64_t* const edges = runs.job.edges + runs.row * parts;
  for (int64_t next = part + step; 0 <= next && next < parts;) {
    const int64_t mine = next + step * lane;
    const bool exists = 0 <= mine && mine < parts;
    const Edges of_lane{exists ? edges[mine] : 0};
    const uint32_t found = __ballot_sync(~0U, of_lane.has_head());
    const uint32_t unknown = __ballot_sync(~0U, exists && !of_lane.told());
    if ((found | unknown) == 0) {
      next += step * kLanes;
      continue;
    }
    const int64_t stop = first_bit(found | unknown);
    if ((found >> stop & 1U) != 0) {
      return __shfl_sync(~0U, of_lane.head(step), static_cast<int>(stop));
    }
    next += step * stop;
    for (int64_t i = 0; i < kWarps; ++i) {
      const int64_t first =
          next * TableJob::kPart + (step > 0 ? i : kWarps - 1 - i) * kLanes * kPerLane;
      const uint32_t word = transpose(runs.heads_body(first + lane));
      const uint32_t filled = __ballot_sync(~0U, word != 0);
      if (filled != 0) {
        const int64_t of = step > 0 ? first_bit(filled) : last_bit(filled);
        const int64_t bit = word == 0 ? 0 : step > 0 ? first_bit(word) : last_bit(word);
        return first + of * kLanes + __shfl_sync(~0U, bit, static_cast<int>(of));
      }
    }
    next += step;
  }
  return none;
}

// Block y has a table, block x rows of it, block z parts of a row.
__global__ void __launch_bounds__(kThreadsPerBlock, 2)
    prepare_kernel(const __grid_constant__ DeviceTables tables) {
  __shared__ uint32_t words[TableJob::kPart / Heads::kSize];
  __shared__ Interval around;
  const TableJob& job = tables.jobs[blockIdx.y];
  const auto thread = static_cast<int64_t>(threadIdx.x);
  const int64_t warp = thread / kLanes;
  const int64_t lane = thread % kLanes;
  for (int64_t row = blockIdx.x; row < job.rows; row += gridDim.x) {
    const RowRuns runs{job, row};
    for (int64_t part = blockIdx.z; part < job.parts(); part += gridDim.z) {
      const int64_t first = part * TableJob::kPart;
      const int64_t of_warp = first + warp * kLanes * kPerLane;
      if (job.kind == TableJob::Kind::kVisible) {
        const uint32_t word = transpose(visible_body(job, row, of_warp + lane));
        const int64_t size = (job.length + kWordSize - 1) / kWordSize * 2;
        if (lane < kPerLane && of_warp / kLanes + lane < size) {
          reinterpret_cast<uint32_t*>(job.bits)[row * size + of_warp / kLanes + lane] = word;
        }
        continue;
      }
      const uint32_t word = transpose(runs.heads_body(of_warp + lane));
      if (lane < kPerLane) {
        words[warp * kPerLane + lane] = word;
      }
      __syncthreads();
      const uint32_t low = __ballot_sync(~0U, words[lane] != 0);
      const uint32_t high = __ballot_sync(~0U, words[lane + kLanes] != 0);
      const Heads heads{words, low | static_cast<uint64_t>(high) << 32, first};
      if (thread == 0) {
        *const_cast<volatile uint64_t*>(&job.edges[row * job.parts() + part]) =
            Edges::of(heads).bits;
      }
      if (warp < 2) {
        const int64_t head =
            warp == 0 ? nearest_head(runs, part, -1, 0) : nearest_head(runs, part, 1, job.length);
        (warp == 0 ? around.begin : around.end) = head;
      }
      __syncthreads();
      const int32_t repeats = runs.write_body(heads, around, thread);
      // Both wait for all threads, too, before shared memory is written again.
      const int32_t once = __syncthreads_count(repeats == 1);
      const bool more = __syncthreads_or(repeats > 1) != 0;
      if (thread == 0 && (more || once > 0)) {
        atomicAdd(&job.repeats[row], more || once > 1 ? 2 : 1);
      }
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

// One block of threads to a part of a line of blocks.
__global__ void __launch_bounds__(kThreadsPerBlock, 2)
    write_block_states_kernel(const __grid_constant__ BlockStatesLaunch launch) {
  extern __shared__ uint64_t shared[];
  const WordStack stack{shared + threadIdx.x, kThreadsPerBlock};
  const Interval blocks = intersect(
      {blockIdx.y * kBlocksPerPart, (blockIdx.y + 1) * kBlocksPerPart}, {0, launch.kv_blocks});
  for (int64_t index = blockIdx.x; index < launch.lines(); index += gridDim.x) {
    const BlockLine line(launch, index);
    line.guess_body(blocks, threadIdx.x, kThreadsPerBlock);
    __syncthreads();
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      // Known ones stay as they are: of an unknown one all threads have read that before the
      // barrier.
      if (line.states[block] != BlockState::kUnknown) {
        continue;
      }
      const BlockContent content = line.words_body(block, threadIdx.x, kThreadsPerBlock, stack);
      const bool some = __syncthreads_or(content.some) != 0;
      const bool all = __syncthreads_and(content.all) != 0;
      if (threadIdx.x == 0) {
        line.states[block] = state_of(some, all);
      }
    }
  }
}

// One block of threads to a line that is to be listed.
__global__ void __launch_bounds__(kThreadsPerBlock, 3)
    write_block_mask_kernel(const __grid_constant__ BlockListsLaunch launch) {
  __shared__ int64_t counts[kThreadsPerBlock];
  const int64_t thread = threadIdx.x;
  for (int64_t index = blockIdx.x; index < launch.lines(); index += gridDim.x) {
    const ListedLine line = listed_line(launch, index);
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
  const MaskLaunch launch = mask_launch<T>(params);
  const int64_t rows = params.rows();
  const int64_t threads = threads_for_row(rows * kLanes);
  const int64_t warps = threads / kLanes;
  const dim3 blocks(
      blocks_for_lines((rows + warps - 1) / warps),
      static_cast<unsigned int>((launch.groups + launch.per_part - 1) / launch.per_part));
  const size_t words = static_cast<size_t>(threads * (1 + launch.plan.depth));
  write_mask_kernel<T>
      <<<blocks, static_cast<unsigned int>(threads), words * sizeof(uint64_t), stream>>>(launch);
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

void launch_prepare(const DeviceTables& tables, cudaStream_t stream) {
  if (tables.zeroed_bytes > 0) {
    cudaMemsetAsync(tables.zeroed, 0, tables.zeroed_bytes, stream);
  }
  const int64_t parts = (tables.longest() + TableJob::kPart - 1) / TableJob::kPart;
  const dim3 blocks(blocks_for_lines(tables.most_rows()), static_cast<unsigned int>(tables.size),
                    static_cast<unsigned int>(parts < 1                 ? 1
                                              : parts < kMaxBlocksOfRow ? parts
                                                                        : kMaxBlocksOfRow));
  prepare_kernel<<<blocks, kThreadsPerBlock, 0, stream>>>(tables);
}

void launch_find_block_states(const BlockMaskParams& params, cudaStream_t stream) {
  const BlockStatesLaunch launch(params);
  const dim3 blocks(
      blocks_for_lines(launch.lines()),
      static_cast<unsigned int>((launch.kv_blocks + kBlocksPerPart - 1) / kBlocksPerPart));
  const size_t words = static_cast<size_t>(kThreadsPerBlock * launch.plan.depth);
  write_block_states_kernel<<<blocks, kThreadsPerBlock, words * sizeof(uint64_t), stream>>>(launch);
}

void launch_write_block_mask(const BlockMaskParams& params, cudaStream_t stream) {
  const BlockListsLaunch launch(params);
  write_block_mask_kernel<<<blocks_for_lines(launch.lines()), kThreadsPerBlock, 0, stream>>>(
      launch);
}

void launch_unmask(const UnmaskParams& params, cudaStream_t stream) {
  with_bits(params.in.element_size,
            [&](auto bits) { launch_unmask<decltype(bits)>(params, stream); });
}

}  // namespace attn_mask
