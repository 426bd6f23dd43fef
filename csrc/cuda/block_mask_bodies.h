#pragma once

// What one thread of each kernel of block masks does; see bodies.h.

#include <algorithm>

#include "cuda/bodies.h"
#include "format/block_mask.h"
#include "rule/divisor.h"
#include "rule/word.h"

namespace attn_mask {

/// What the hulls of a block's first and last row say of it.
enum class BlockGuess : uint8_t { kEmpty, kFull, kAsk };

/// Blocks of a line that one block of threads takes.
inline constexpr int64_t kBlocksPerPart = 32;

/// All that the kernel of states is given.
struct BlockStatesParams {
  BlockMaskTask task;
  int64_t q_blocks;
  int64_t kv_blocks;
  int64_t row_words;  // words to a row of a block
  Divisor by_q_blocks;
  Divisor by_heads;
  Divisor by_row_words;
  WordPlan plan;

  explicit BlockStatesParams(const BlockMaskTask& of)
      : task(of),
        q_blocks(task.q_blocks()),
        kv_blocks(task.kv_blocks()),
        row_words((std::min(task.kv_block, task.kv_length) + kWordSize - 1) / kWordSize),
        by_q_blocks(q_blocks),
        by_heads(task.heads),
        by_row_words(row_words),
        plan(task.rule, Hull(task.rule), task.kv_positions) {}

  ATTN_MASK_INLINE int64_t lines() const { return task.planes() * q_blocks; }
};

static_assert(sizeof(BlockStatesParams) <= 4096, "kernel parameters");

/// What the elements of a block say, as far as one thread has looked.
struct BlockAnswer {
  bool some;
  bool all;
};

/// The blocks of some queries of a plane.
struct BlockLine {
  const BlockStatesParams& params;
  int64_t batch;
  int64_t head;
  Interval rows;
  BlockState* states;

  ATTN_MASK_INLINE BlockLine(const BlockStatesParams& of, int64_t index) : params(of) {
    const int64_t plane = params.by_q_blocks.divide(index);
    batch = params.by_heads.divide(plane);
    head = plane - batch * params.task.heads;
    rows = params.task.rows_of(index - plane * params.q_blocks);
    states = params.task.states + index * params.kv_blocks;
  }

  ATTN_MASK_INLINE Query query(int64_t row) const {
    return {batch, head, row, params.task.q_positions.at(batch, row)};
  }

  /// Hulls go upwards with the query, so that those of the first and the last row tell where those
  /// between them lie.
  ATTN_MASK_INLINE BlockGuess guess(int64_t block) const {
    const BlockMaskTask& task = params.task;
    if (task.q_positions.listed || task.kv_positions.listed) {
      return BlockGuess::kAsk;
    }
    const Interval columns = task.columns_of(block);
    const Hull hull(task.rule);
    const RowHull first = row_hull(task.rule, hull, params.plan, query(rows.begin));
    const RowHull last = row_hull(task.rule, hull, params.plan, query(rows.end - 1));
    const int64_t shift = task.kv_positions.at(batch, 0);
    const Interval keys{columns.begin + shift, columns.end + shift};
    if (intersect(keys, {first.positions.begin, last.positions.end}).empty()) {
      return BlockGuess::kEmpty;
    }
    const bool is_whole =
        rows.end - rows.begin == task.q_block && columns.end - columns.begin == task.kv_block;
    const bool full = first.exact && is_whole && last.positions.begin <= keys.begin &&
                      keys.end <= first.positions.end;
    return full ? BlockGuess::kFull : BlockGuess::kAsk;
  }

  /// Of some blocks, the states that hulls tell; for one thread of the line's.
  ATTN_MASK_INLINE void guess_body(Interval blocks, int64_t thread, int64_t threads) const {
    ATTN_MASK_ONE_BY_ONE
    for (int64_t block = blocks.begin + thread; block < blocks.end; block += threads) {
      const BlockGuess guessed = guess(block);
      states[block] = guessed == BlockGuess::kEmpty  ? BlockState::kEmpty
                      : guessed == BlockGuess::kFull ? BlockState::kFull
                                                     : BlockState::kUnknown;
    }
  }

  /// What some words of a block say.
  ATTN_MASK_INLINE BlockAnswer words_body(int64_t block, int64_t thread, int64_t threads,
                                          const WordStack& stack) const {
    const BlockMaskTask& task = params.task;
    const Interval columns = task.columns_of(block);
    const Hull hull(task.rule);
    BlockAnswer answer{false, rows.end - rows.begin == task.q_block &&
                                  columns.end - columns.begin == task.kv_block};
    ATTN_MASK_ONE_BY_ONE
    for (int64_t i = thread; i < (rows.end - rows.begin) * params.row_words; i += threads) {
      const int64_t row = params.by_row_words.divide(i);
      const int64_t first = columns.begin + (i - row * params.row_words) * kWordSize;
      const Interval of_word = intersect({first, first + kWordSize}, columns);
      if (of_word.empty()) {
        continue;
      }
      const WordRow of_row =
          WordRow::of(task.rule, hull, params.plan, query(rows.begin + row), task.kv_positions);
      const uint64_t word =
          row_word(task.rule, params.plan, of_row, task.kv_positions, of_word, stack);
      answer.some = answer.some || word != 0;
      answer.all = answer.all && word == low_bits(of_word.end - of_word.begin);
      if (answer.some && !answer.all) {
        break;
      }
    }
    return answer;
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
struct BlockListsParams {
  BlockMaskTask task;
  int64_t q_blocks;
  int64_t kv_blocks;
  Divisor by_plane_lines;  // of one kind
  Divisor by_heads;

  explicit BlockListsParams(const BlockMaskTask& of)
      : task(of),
        q_blocks(task.q_blocks()),
        kv_blocks(task.kv_blocks()),
        by_plane_lines(q_blocks + kv_blocks),
        by_heads(task.heads) {}

  /// Lines of one kind.
  ATTN_MASK_INLINE int64_t kind_lines() const { return task.planes() * (q_blocks + kv_blocks); }
  ATTN_MASK_INLINE int64_t lines() const { return kind_lines() * (task.separate_full ? 2 : 1); }
};

static_assert(sizeof(BlockListsParams) <= 4096, "kernel parameters");

ATTN_MASK_INLINE ListedLine listed_line(const BlockListsParams& params, int64_t index) {
  const BlockMaskTask& task = params.task;
  const int64_t q_blocks = params.q_blocks;
  const int64_t kv_blocks = params.kv_blocks;
  const int64_t of_kind = params.kind_lines();
  const bool is_full = index >= of_kind;
  const int64_t in_kind = is_full ? index - of_kind : index;
  const int64_t plane = params.by_plane_lines.divide(in_kind);
  const int64_t in_plane = in_kind - plane * (q_blocks + kv_blocks);
  const int64_t batch = params.by_heads.divide(plane);
  const int64_t stored = batch * task.stored_heads + plane - batch * task.heads;
  const BlockState* const states = task.states + plane * q_blocks * kv_blocks;
  if (in_plane < q_blocks) {
    return {states + in_plane * kv_blocks,
            1,
            kv_blocks,
            task.kv_width,
            task.kv[is_full ? 1 : 0],
            stored * q_blocks + in_plane,
            is_full,
            !task.separate_full};
  }
  const int64_t column = in_plane - q_blocks;
  return {states + column,
          kv_blocks,
          q_blocks,
          task.q_width,
          task.q[is_full ? 1 : 0],
          stored * kv_blocks + column,
          is_full,
          !task.separate_full};
}

}  // namespace attn_mask
