#pragma once

#include <cstdint>

#include "macros.h"

namespace attn_mask {

inline constexpr int64_t kThreadsPerBlock = 256;
inline constexpr int64_t kLanes = 32;
inline constexpr int64_t kWarps = kThreadsPerBlock / kLanes;
// Where warps share nothing: few, so that small masks have blocks for many multiprocessors.
inline constexpr int64_t kWarpThreads = 128;
// Where a block has a row to itself.
inline constexpr int64_t kMaxRowBlocks = 65536;
// Where several share one.
inline constexpr int64_t kMaxBlocksOfRow = 65535;

/// Threads of a block that shares one row of `items` stores among them: whole warps.
inline int64_t threads_for_row(int64_t items) {
  const int64_t threads = (items + 31) / 32 * 32;
  return threads < kThreadsPerBlock ? (threads > 0 ? threads : 32) : kThreadsPerBlock;
}

}  // namespace attn_mask
