#pragma once

#include "rule/problem.h"

namespace attn_mask {

/// For each line of blocks (those of some queries, or those of some keys) how many are of a kind,
/// and which: these ascending, and then all others ascending. A line stores the first `width` of
/// its numbers.
struct BlockLists {
  int32_t* num_blocks;  // [batch_size, stored_heads, lines]
  int32_t* indices;     // [batch_size, stored_heads, lines, width]; null: not wanted
};

/// The most blocks of one kind that any line has.
struct LongestLines {
  int64_t kv;  // blocks of keys of a block of queries
  int64_t q;   // blocks of queries of a block of keys
};

/// What a block of queries and keys holds: no pair that attends, some, or nothing but.
enum class BlockState : uint8_t { kEmpty, kPartial, kFull, kUnknown };

/// The parameters of a kernel that writes a block mask, flex attention's. A block is full only if
/// all of its q_block x kv_block elements exist, so that blocks that reach beyond the mask are not.
struct BlockMaskParams : Problem {
  int64_t q_block;
  int64_t kv_block;
  bool separate_full;    // else full blocks count as partial, and nothing is written for them
  int64_t stored_heads;  // `heads` are the first of these
  int64_t kv_width;      // at most kv_blocks()
  int64_t q_width;       // at most q_blocks()
  BlockLists kv[2];      // blocks of keys for each block of queries: partial, full
  BlockLists q[2];       // blocks of queries for each block of keys
  BlockState* states;    // [batch_size, heads, q_blocks, kv_blocks]; null: none

  ATTN_MASK_INLINE int64_t planes() const { return batch_size * heads; }
  ATTN_MASK_INLINE int64_t q_blocks() const { return (q_length + q_block - 1) / q_block; }
  ATTN_MASK_INLINE int64_t kv_blocks() const { return (kv_length + kv_block - 1) / kv_block; }

  /// Where a plane is stored, counted through heads and batch.
  ATTN_MASK_INLINE int64_t stored(int64_t plane) const {
    return plane / heads * stored_heads + plane % heads;
  }

  /// The positions of a block of queries, or of keys.
  ATTN_MASK_INLINE Interval rows_of(int64_t block) const {
    return intersect({block * q_block, (block + 1) * q_block}, {0, q_length});
  }
  ATTN_MASK_INLINE Interval columns_of(int64_t block) const {
    return intersect({block * kv_block, (block + 1) * kv_block}, {0, kv_length});
  }
};

static_assert(sizeof(BlockMaskParams) <= kMaxParameterBytes);

}  // namespace attn_mask
