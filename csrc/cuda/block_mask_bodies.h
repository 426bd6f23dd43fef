#pragma once

// What one thread of each kernel of block masks does; see bodies.h.

#include <algorithm>

#include "cuda/bodies.h"
#include "format/block_mask.h"
#include "rule/divisor.h"
#include "rule/word.h"

namespace attn_mask {

/// Blocks of a line that one block of threads takes.
inline constexpr int64_t kBlocksPerPart = 32;

/// All that the kernel of states is given.
struct BlockStatesLaunch {
  BlockMaskParams params;
  int64_t q_blocks;
  int64_t kv_blocks;
  int64_t row_words;  // words to a row of a block
  Divisor by_q_blocks;
  Divisor by_heads;
  Divisor by_row_words;
  Hull hull;
  WordPlan plan;

  explicit BlockStatesLaunch(const BlockMaskParams& of)
      : params(of),
        q_blocks(params.q_blocks()),
        kv_blocks(params.kv_blocks()),
        row_words((std::min(params.kv_block, params.kv_length) + kWordSize - 1) / kWordSize),
        by_q_blocks(q_blocks),
        by_heads(params.heads),
        by_row_words(row_words),
        hull(params.rule),
        plan(params.rule, hull, params.kv_positions) {}

  ATTN_MASK_INLINE int64_t lines() const { return params.planes() * q_blocks; }
};

static_assert(sizeof(BlockStatesLaunch) <= 4096, "kernel parameters");

/// What the elements of a block hold, as far as one thread has evaluated them.
struct BlockContent {
  bool some;
  bool all;
};

/// The blocks of some queries of a plane.
struct BlockLine {
  const BlockStatesLaunch& launch;
  int64_t batch;
  int64_t head;
  Interval rows;
  BlockState* states;

  ATTN_MASK_INLINE BlockLine(const BlockStatesLaunch& of, int64_t index) : launch(of) {
    const int64_t plane = launch.by_q_blocks.divide(index);
    batch = launch.by_heads.divide(plane);
    head = plane - batch * launch.params.heads;
    rows = launch.params.rows_of(index - plane * launch.q_blocks);
    states = launch.params.states + index * launch.kv_blocks;
  }

  ATTN_MASK_INLINE Query query(int64_t row) const {
    return {batch, head, row, launch.params.q_positions.at(batch, row)};
  }

  /// Of some blocks, the states that hulls decide; for one thread of the line's. Hulls go upwards
  /// with the query, so that those of the first and the last row bound those between them.
  ATTN_MASK_INLINE void guess_body(Interval blocks, int64_t thread, int64_t threads) const {
    const BlockMaskParams& params = launch.params;
    const bool is_known = !params.q_positions.listed && !params.kv_positions.listed;
    const RowHull first = row_hull(params.rule, launch.hull, launch.plan, query(rows.begin));
    const RowHull last = row_hull(params.rule, launch.hull, launch.plan, query(rows.end - 1));
    const int64_t shift = params.kv_positions.at(batch, 0);
    const Interval some{first.positions.begin - shift, last.positions.end - shift};
    const bool may_be_full = is_known && first.exact && rows.end - rows.begin == params.q_block;
    const Interval all{last.positions.begin - shift, first.positions.end - shift};
    ATTN_MASK_ONE_BY_ONE
    for (int64_t block = blocks.begin + thread; block < blocks.end; block += threads) {
      const Interval columns = params.columns_of(block);
      const bool is_empty = is_known && intersect(columns, some).empty();
      const bool is_full = may_be_full && columns.end - columns.begin == params.kv_block &&
                           all.begin <= columns.begin && columns.end <= all.end;
      states[block] = is_empty  ? BlockState::kEmpty
                      : is_full ? BlockState::kFull
                                : BlockState::kUnknown;
    }
  }

  /// What some words of a block hold.
  ATTN_MASK_INLINE BlockContent words_body(int64_t block, int64_t thread, int64_t threads,
                                           const WordStack& stack) const {
    const BlockMaskParams& params = launch.params;
    const Interval columns = params.columns_of(block);
    BlockContent content{false, rows.end - rows.begin == params.q_block &&
                                    columns.end - columns.begin == params.kv_block};
    ATTN_MASK_ONE_BY_ONE
    for (int64_t i = thread; i < (rows.end - rows.begin) * launch.row_words; i += threads) {
      const int64_t row = launch.by_row_words.divide(i);
      const int64_t first = columns.begin + (i - row * launch.row_words) * kWordSize;
      const Interval of_word = intersect({first, first + kWordSize}, columns);
      if (of_word.empty()) {
        continue;
      }
      const WordRow of_row = WordRow::of(params.rule, launch.hull, launch.plan,
                                         query(rows.begin + row), params.kv_positions);
      const uint64_t word =
          row_word(params.rule, launch.plan, of_row, params.kv_positions, of_word, stack);
      content.some = content.some || word != 0;
      content.all = content.all && word == low_bits(of_word.end - of_word.begin);
      if (content.some && !content.all) {
        break;
      }
    }
    return content;
  }
};

ATTN_MASK_INLINE BlockState state_of(bool some, bool all) {
  return all ? BlockState::kFull : some ? BlockState::kPartial : BlockState::kEmpty;
}

/// One line of a block mask to be listed: `kind` 0 partial blocks, 1 full ones, of the states from
/// `first` on, `step` apart.
struct ListedLine {
  const BlockState* first;
  int64_t step;
  int64_t total;
  int64_t width;
  BlockLists lists;
  int64_t line;  // where it is stored
  bool is_full;
  bool takes_full;  // partial blocks are all that are not empty

  ATTN_MASK_INLINE bool holds(int64_t block) const {
    const BlockState state = first[block * step];
    return is_full ? state == BlockState::kFull
                   : state == BlockState::kPartial || (takes_full && state == BlockState::kFull);
  }

  /// First half: how many blocks of its part a thread has to list.
  ATTN_MASK_INLINE int64_t count_body(Interval part) const {
    int64_t count = 0;
    ATTN_MASK_ONE_BY_ONE
    for (int64_t block = part.begin; block < part.end; ++block) {
      count += holds(block) ? 1 : 0;
    }
    return count;
  }

  /// Second half: lists the blocks of the thread's part. False where they are too many.
  ATTN_MASK_INLINE bool list_body(Interval part, const int64_t* counts, int64_t thread,
                                  int64_t threads) const {
    int64_t before = 0;
    int64_t count = 0;
    ATTN_MASK_ONE_BY_ONE
    for (int64_t other = 0; other < threads; ++other) {
      before += other < thread ? counts[other] : 0;
      count += counts[other];
    }
    if (thread == 0) {
      lists.num_blocks[line] = static_cast<int32_t>(count);
    }
    if (lists.indices == nullptr) {
      return count <= width;
    }
    int64_t place = before;                       // of the next block that is listed
    int64_t after = count + part.begin - before;  // of the next that is not
    ATTN_MASK_ONE_BY_ONE
    for (int64_t block = part.begin; block < part.end; ++block) {
      const int64_t to = holds(block) ? place++ : after++;
      if (to < width) {
        lists.indices[line * width + to] = static_cast<int32_t>(block);
      }
    }
    return count <= width;
  }
};

/// All that the kernel of lists is given. Lines are of all kinds and both directions, one after the
/// other.
struct BlockListsLaunch {
  BlockMaskParams params;
  int64_t q_blocks;
  int64_t kv_blocks;
  Divisor by_plane_lines;  // of one kind
  Divisor by_heads;

  explicit BlockListsLaunch(const BlockMaskParams& of)
      : params(of),
        q_blocks(params.q_blocks()),
        kv_blocks(params.kv_blocks()),
        by_plane_lines(q_blocks + kv_blocks),
        by_heads(params.heads) {}

  /// Lines of one kind.
  ATTN_MASK_INLINE int64_t kind_lines() const { return params.planes() * (q_blocks + kv_blocks); }
  ATTN_MASK_INLINE int64_t lines() const { return kind_lines() * (params.separate_full ? 2 : 1); }
};

static_assert(sizeof(BlockListsLaunch) <= 4096, "kernel parameters");

ATTN_MASK_INLINE ListedLine listed_line(const BlockListsLaunch& launch, int64_t index) {
  const BlockMaskParams& params = launch.params;
  const int64_t q_blocks = launch.q_blocks;
  const int64_t kv_blocks = launch.kv_blocks;
  const int64_t of_kind = launch.kind_lines();
  const bool is_full = index >= of_kind;
  const int64_t in_kind = is_full ? index - of_kind : index;
  const int64_t plane = launch.by_plane_lines.divide(in_kind);
  const int64_t in_plane = in_kind - plane * (q_blocks + kv_blocks);
  const int64_t batch = launch.by_heads.divide(plane);
  const int64_t stored = batch * params.stored_heads + plane - batch * params.heads;
  const BlockState* const states = params.states + plane * q_blocks * kv_blocks;
  if (in_plane < q_blocks) {
    return {states + in_plane * kv_blocks,
            1,
            kv_blocks,
            params.kv_width,
            params.kv[is_full ? 1 : 0],
            stored * q_blocks + in_plane,
            is_full,
            !params.separate_full};
  }
  const int64_t column = in_plane - q_blocks;
  return {states + column,
          kv_blocks,
          q_blocks,
          params.q_width,
          params.q[is_full ? 1 : 0],
          stored * kv_blocks + column,
          is_full,
          !params.separate_full};
}

}  // namespace attn_mask
