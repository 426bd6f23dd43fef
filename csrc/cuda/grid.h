#pragma once

#include <cstdint>

#include "macros.h"

namespace attn_mask {

inline constexpr int64_t kThreadsPerBlock = 256;
// Enough blocks to fill any present GPU several times over; the rest is done by the grid-stride
// loop.
inline constexpr int64_t kMaxBlocks = 4096;
// Where a block has a row to itself.
inline constexpr int64_t kMaxRowBlocks = 65536;

/// Where a thread stands in a one-dimensional grid. Kernel bodies take it as an argument, so that a
/// host test can play every thread in turn.
struct GridPosition {
  int64_t block;
  int64_t thread;
  int64_t blocks;
  int64_t threads;

  ATTN_MASK_INLINE int64_t first() const { return block * threads + thread; }
  ATTN_MASK_INLINE int64_t step() const { return blocks * threads; }
};

/// Blocks for `items` items, one to a thread.
inline int64_t blocks_for(int64_t items) {
  const int64_t blocks = (items + kThreadsPerBlock - 1) / kThreadsPerBlock;
  return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

/// Threads of a block that shares one row of `items` stores among them: whole warps.
inline int64_t threads_for_row(int64_t items) {
  const int64_t threads = (items + 31) / 32 * 32;
  return threads < kThreadsPerBlock ? (threads > 0 ? threads : 32) : kThreadsPerBlock;
}

}  // namespace attn_mask
