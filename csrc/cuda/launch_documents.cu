// A thin shell around the bodies, as in launch.cu.

#include "cuda/document_bodies.h"
#include "cuda/launch.h"

namespace attn_mask {
namespace {

__global__ void __launch_bounds__(kDocumentThreads, 1)
    find_documents_kernel(const __grid_constant__ DocumentParams params) {
  __shared__ DocumentStarts of_warps[kDocumentThreads / kLanes];
  __shared__ int32_t longest;
  const auto thread = static_cast<int64_t>(threadIdx.x);
  const auto warp = static_cast<int32_t>(thread / kLanes);
  const auto lane = static_cast<int32_t>(thread % kLanes);
  if (thread == 0) {
    longest = 0;
  }
  DocumentStarts seen{0, 0};
  int32_t longest_of_mine = 0;
  bool rise = true;
  for (int64_t chunk = 0; chunk < params.total(); chunk += kTokensOfChunk) {
    const int64_t first = chunk + warp * kTokensOfWarp;
    const LaneStarts mine = starts_body(params, first + lane);
    rise = rise && mine.rise;
    uint32_t words[kTokensOfLane];
    DocumentStarts of_warp{0, 0};
    for (int32_t i = 0; i < kTokensOfLane; ++i) {
      words[i] = __ballot_sync(~0U, mine.begins >> i & 1U);
      of_warp.add(words[i], first + i * kLanes);
    }
    __syncthreads();  // all have read what warps found before
    if (lane == 0) {
      of_warps[warp] = of_warp;
    }
    __syncthreads();
    // Lane i has what warp i found, and how many documents begin up to its last token.
    const DocumentStarts of_lane = of_warps[lane];
    int32_t up_to = of_lane.count;
    for (int32_t distance = 1; distance < kLanes; distance *= 2) {
      const int32_t before = __shfl_up_sync(~0U, up_to, distance);
      up_to += lane >= distance ? before : 0;
    }
    const uint32_t all = __ballot_sync(~0U, of_lane.count > 0);
    const uint32_t earlier = all & static_cast<uint32_t>(low_bits(warp));
    const int32_t count = __shfl_sync(~0U, up_to - of_lane.count, warp);
    const int32_t last_earlier =
        __shfl_sync(~0U, of_lane.last, earlier == 0 ? 0 : static_cast<int32_t>(last_bit(earlier)));
    const int32_t last =
        __shfl_sync(~0U, of_lane.last, all == 0 ? 0 : static_cast<int32_t>(last_bit(all)));
    const DocumentStarts before{seen.count + count, earlier == 0 ? seen.last : last_earlier};
    const int32_t ended = write_borders_body(params, words, before, first, lane);
    longest_of_mine = ended > longest_of_mine ? ended : longest_of_mine;
    seen.count += __shfl_sync(~0U, up_to, static_cast<int32_t>(kLanes - 1));
    seen.last = all == 0 ? seen.last : last;
  }
  __syncthreads();
  atomicMax(&longest, longest_of_mine);
  const bool all_rise = __syncthreads_and(rise) != 0;
  if (thread == 0) {
    const int64_t of_last = params.total() - seen.last;
    params.set_found(seen.count, of_last > longest ? of_last : longest, all_rise);
  }
  fill_borders_body(params, seen.count, thread);
}

}  // namespace

void launch_find_documents(const DocumentParams& params, cudaStream_t stream) {
  find_documents_kernel<<<1, kDocumentThreads, 0, stream>>>(params);
}

}  // namespace attn_mask
