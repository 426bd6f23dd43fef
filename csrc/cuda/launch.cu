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
__global__ void __launch_bounds__(kWarpThreads, 5)
    write_mask_kernel(const __grid_constant__ MaskLaunch launch) {
  extern __shared__ uint64_t shared[];
  constexpr int64_t kWarpsOfBlock = kWarpThreads / kLanes;
  const int64_t warp = threadIdx.x / kLanes;
  const int64_t lane = threadIdx.x % kLanes;
  const int64_t steps = launch.plan.size;
  uint64_t* const words = shared + warp * kLanes;
  const WordStack stack{shared + kWarpThreads + threadIdx.x, kWarpThreads};
  auto* const keys =
      reinterpret_cast<Interval*>(shared + kWarpThreads * (1 + launch.plan.depth)) + warp * steps;
  const int32_t begin = static_cast<int32_t>(blockIdx.y) * launch.per_part;
  const int32_t end =
      begin + launch.per_part < launch.groups ? begin + launch.per_part : launch.groups;
  for (int64_t row = blockIdx.x * kWarpsOfBlock + warp; row < launch.rows;
       row += gridDim.x * kWarpsOfBlock) {
    RowWriter<T> writer(launch, row);
    if (lane < steps) {
      keys[lane] = writer.keys_body(lane);
    }
    __syncwarp();
    bool tests = launch.params.unmasking.wanted;  // whether the row has a visible key
    const int32_t first = tests ? writer.likely_group(begin, end) : begin;
    int32_t other = -1;  // that is looked at, too
    for (int32_t group = first;;) {
      const uint64_t word = writer.word(group, lane, keys, stack);
      if (tests) {
        const bool visible = __any_sync(~0U, word != 0) != 0;
        if (!visible && ++other < launch.groups) {
          group = other;
          continue;
        }
        tests = false;
        if (!visible) {
          writer.unmask();
        }
        if (other >= 0) {
          group = first;
          continue;
        }
      }
      if (launch.by_words) {
        words[lane] = word;
        __syncwarp();
        writer.write_packs(group, lane, words);
      } else {
        writer.write_pack(group * kLanes + lane, static_cast<uint32_t>(word));
      }
      __syncwarp();  // all have read the words and, after the last group, the keys
      group = group + 1 < end ? group + 1 : begin;
      if (group == first) {
        break;
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

// What a block holds, by all lanes of a warp, until that is known. The words that they have at a
// time are far apart.
__device__ BlockState evaluate_block(const BlockLine& line, int64_t block, int64_t lane,
                                     const WordStack& stack) {
  const int64_t per_lane = (line.words() + kLanes - 1) / kLanes;
  BlockContent content{false, line.is_whole(block)};
  for (int64_t i = 0; i < per_lane && !content.is_mixed(); ++i) {
    const BlockContent of_lane = line.word_body(block, lane * per_lane + i, stack);
    content.some = __any_sync(~0U, content.some || of_lane.some) != 0;
    content.all = __all_sync(~0U, content.all && of_lane.all) != 0;
  }
  return content.state();
}

// A warp takes parts of lines.
__global__ void __launch_bounds__(kWarpThreads, 4)
    write_block_states_kernel(const __grid_constant__ BlockStatesLaunch launch) {
  extern __shared__ uint64_t shared[];
  const WordStack stack{shared + threadIdx.x, kWarpThreads};
  const int64_t warp = threadIdx.x / kLanes;
  const int64_t lane = threadIdx.x % kLanes;
  const int32_t steps = launch.plan.size;
  auto* const keys =
      reinterpret_cast<LineKeys*>(shared + launch.plan.depth * kWarpThreads) + warp * steps;
  const int64_t warps = kWarpThreads / kLanes;
  const int64_t parts = launch.lines() * launch.parts;
  for (int64_t index = blockIdx.x * warps + warp; index < parts; index += gridDim.x * warps) {
    const int64_t line_index = launch.by_parts.divide(index);
    const int64_t begin = (index - line_index * launch.parts) * launch.part_size;
    const Interval blocks = intersect({begin, begin + launch.part_size}, {0, launch.kv_blocks});
    const BlockLine line(launch, line_index);
    if (lane < steps) {
      keys[lane] = line.keys_body(static_cast<int32_t>(lane));
    }
    __syncwarp();
    for (int64_t block = blocks.begin + lane; block - lane < blocks.end; block += kLanes) {
      BlockState state = block < blocks.end ? line.guess_body(block, keys) : BlockState::kEmpty;
      uint32_t unknown = __ballot_sync(~0U, state == BlockState::kUnknown);
      for (; unknown != 0; unknown &= unknown - 1) {
        const int64_t of = first_bit(unknown);
        const BlockState found = evaluate_block(line, block - lane + of, lane, stack);
        state = lane == of ? found : state;
      }
      if (block < blocks.end) {
        line.states[block] = state;
      }
    }
    __syncwarp();  // all have read the keys
  }
}

// Which blocks of some lines are of each kind, 32 to a word: `kChunk` words of each line.
struct ListedWords {
  static constexpr int64_t kChunk = 32;

  uint32_t of[2][kLanes][kChunk + 1];  // one more: columns lie in banks of their own
};

// The words of a group from block `begin` on, by all threads.
__device__ void find_words(const LineGroup& group, int64_t begin, ListedWords& words) {
  const int64_t warp = threadIdx.x / kLanes;
  const int64_t lane = threadIdx.x % kLanes;
  const bool along = group.block_step == 1;
  constexpr int64_t kTogether = 8;  // loads
  if (along) {
    for (int64_t first = 0; first < ListedWords::kChunk; first += kTogether) {
      BlockState states[kTogether];
      for (int64_t i = 0; i < kTogether; ++i) {
        states[i] = group.state(warp, begin + (first + i) * kLanes + lane);
      }
      for (int64_t i = 0; i < kTogether; ++i) {
        for (int64_t kind = 0; kind < 2; ++kind) {
          const uint32_t word = __ballot_sync(~0U, group.holds(kind, states[i]));
          if (lane == i) {
            words.of[kind][warp][first + i] = word;
          }
        }
      }
    }
    return;
  }
  for (int64_t word = warp; word < ListedWords::kChunk; word += kWarps) {
    uint32_t of[2] = {0, 0};
    for (int64_t first = 0; first < kLanes; first += kTogether) {
      BlockState states[kTogether];
      for (int64_t i = 0; i < kTogether; ++i) {
        states[i] = group.state(lane, begin + word * kLanes + first + i);
      }
      for (int64_t i = 0; i < kTogether; ++i) {
        for (int64_t kind = 0; kind < 2; ++kind) {
          of[kind] |= (group.holds(kind, states[i]) ? 1U : 0U) << (first + i);
        }
      }
    }
    words.of[0][lane][word] = of[0];
    words.of[1][lane][word] = of[1];
  }
}

// One block of threads to some lines that are to be listed: counts them, then lists them.
__global__ void __launch_bounds__(kThreadsPerBlock, 3)
    write_block_mask_kernel(const __grid_constant__ BlockListsLaunch launch) {
  __shared__ ListedWords words;
  constexpr int64_t kBlocks = ListedWords::kChunk * kLanes;
  const int64_t warp = threadIdx.x / kLanes;
  const int64_t lane = threadIdx.x % kLanes;
  for (int64_t index = blockIdx.x; index < launch.groups(); index += gridDim.x) {
    const LineGroup group = launch.group(index);
    const bool has_one_chunk = group.total <= kBlocks;
    // A warp has every eighth line, lane i the counts of the i-th of its lines and kinds.
    constexpr int64_t kMine = 2 * kLanes / kWarps;
    uint32_t counts = 0;
    uint32_t before = 0;
    for (int64_t pass = 0; pass < 2; ++pass) {
      for (int64_t begin = 0; begin < group.total; begin += kBlocks) {
        if (pass == 0 || !has_one_chunk) {
          __syncthreads();
          find_words(group, begin, words);
          __syncthreads();
        }
        const int64_t left = (group.total - begin + kLanes - 1) / kLanes;
        const int64_t size = left < ListedWords::kChunk ? left : ListedWords::kChunk;
        for (int64_t mine = 0; mine < kMine; ++mine) {
          const int64_t kind = mine % 2;
          const int64_t line = mine / 2 * kWarps + warp;
          if (line >= group.lines || (kind == 1 && !group.separate_full)) {
            continue;
          }
          const uint32_t* const of_line = words.of[kind][line];
          auto here = static_cast<uint32_t>(count_bits(of_line[lane]));
          for (int32_t distance = kLanes / 2; distance > 0; distance /= 2) {
            here += __shfl_xor_sync(~0U, here, distance);
          }
          if (pass == 0) {
            counts += lane == mine ? here : 0;
            continue;
          }
          const int64_t count = __shfl_sync(~0U, counts, static_cast<int>(mine));
          int64_t place = __shfl_sync(~0U, before, static_cast<int>(mine));
          before += lane == mine ? here : 0;
          if (group.lists[kind].indices == nullptr) {
            continue;
          }
          for (int64_t word = 0; word < size; ++word) {
            const int64_t first = begin + word * kLanes;
            if (!group.is_beyond(first, of_line[word], place, count)) {
              group.list_body(kind, line, first, of_line[word], place, count, lane);
            }
            place += count_bits(of_line[word]);
          }
        }
      }
    }
    const int64_t kind = lane % 2;
    const int64_t line = lane / 2 * kWarps + warp;
    if (lane < kMine && line < group.lines && (kind == 0 || group.separate_full)) {
      group.lists[kind].num_blocks[group.stored + line] = static_cast<int32_t>(counts);
      if (counts > group.width) {
        __trap();  // a width that is too small would lose blocks
      }
    }
  }
}

unsigned int blocks_for_lines(int64_t lines) {
  return static_cast<unsigned int>(lines < kMaxRowBlocks ? lines : kMaxRowBlocks);
}

template <typename T>
void launch_write_mask(const MaskParams& params, cudaStream_t stream) {
  const MaskLaunch launch = mask_launch<T>(params);
  const int64_t rows = params.rows();
  const int64_t warps = kWarpThreads / kLanes;
  const dim3 blocks(
      blocks_for_lines((rows + warps - 1) / warps),
      static_cast<unsigned int>((launch.groups + launch.per_part - 1) / launch.per_part));
  const size_t bytes =
      static_cast<size_t>(kWarpThreads * (1 + launch.plan.depth)) * sizeof(uint64_t) +
      static_cast<size_t>(warps * launch.plan.size) * sizeof(Interval);
  write_mask_kernel<T><<<blocks, kWarpThreads, bytes, stream>>>(launch);
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
  const int64_t warps = kWarpThreads / kLanes;
  const int64_t blocks = (launch.lines() * launch.parts + warps - 1) / warps;
  const size_t bytes = static_cast<size_t>(kWarpThreads * launch.plan.depth) * sizeof(uint64_t) +
                       static_cast<size_t>(warps * launch.plan.size) * sizeof(LineKeys);
  write_block_states_kernel<<<blocks_for_lines(blocks), kWarpThreads, bytes, stream>>>(launch);
}

void launch_write_block_mask(const BlockMaskParams& params, cudaStream_t stream) {
  const BlockListsLaunch launch(params);
  write_block_mask_kernel<<<blocks_for_lines(launch.groups()), kThreadsPerBlock, 0, stream>>>(
      launch);
}

void launch_unmask(const UnmaskParams& params, cudaStream_t stream) {
  with_bits(params.in.element_size,
            [&](auto bits) { launch_unmask<decltype(bits)>(params, stream); });
}

}  // namespace attn_mask
