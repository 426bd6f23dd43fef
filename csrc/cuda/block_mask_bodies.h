#pragma once

// What one thread of each kernel of block masks does; see bodies.h.

#include "cuda/bodies.h"
#include "format/block_mask.h"

namespace attn_mask {

/// What the hulls of a block's first and last row say of it.
enum class BlockGuess : uint8_t { kEmpty, kFull, kAsk };

/// Hulls of causality, windows and chunks go upwards with the query, so that those of the first and
/// the last row tell where those between them lie.
ATTN_MASK_INLINE BlockGuess guess_block(const BlockMaskTask& task, int64_t plane, Interval rows,
                                        Interval columns) {
  if (task.q_positions.listed || task.kv_positions.listed) {
    return BlockGuess::kAsk;
  }
  const Query query = task.query(plane, rows.begin);
  const RowHull first = row_hull(task.rule, query);
  const RowHull last = row_hull(task.rule, task.query(plane, rows.end - 1));
  const int64_t shift = task.kv_positions.at(query.batch, 0);
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

/// Of one line of blocks, the states that hulls tell; for one thread of the line's.
ATTN_MASK_INLINE void guess_line_body(const BlockMaskTask& task, int64_t line, int64_t thread,
                                      int64_t threads) {
  const int64_t q_blocks = task.q_blocks();
  const int64_t kv_blocks = task.kv_blocks();
  const int64_t plane = line / q_blocks;
  const Interval rows = task.rows_of(line - plane * q_blocks);
  ATTN_MASK_ONE_BY_ONE
  for (int64_t block = thread; block < kv_blocks; block += threads) {
    const BlockGuess guess = guess_block(task, plane, rows, task.columns_of(block));
    task.states[line * kv_blocks + block] = guess == BlockGuess::kEmpty  ? BlockState::kEmpty
                                            : guess == BlockGuess::kFull ? BlockState::kFull
                                                                         : BlockState::kUnknown;
  }
}

/// What the elements of a block say, as far as one thread asks them.
struct BlockAnswer {
  bool some;
  bool all;
};

ATTN_MASK_INLINE BlockAnswer ask_block_body(const BlockMaskTask& task, int64_t line, int64_t block,
                                            int64_t thread, int64_t threads) {
  const int64_t q_blocks = task.q_blocks();
  const int64_t plane = line / q_blocks;
  const Interval rows = task.rows_of(line - plane * q_blocks);
  const Interval columns = task.columns_of(block);
  const int64_t width = columns.end - columns.begin;
  BlockAnswer answer{false, rows.end - rows.begin == task.q_block && width == task.kv_block};
  ATTN_MASK_ONE_BY_ONE
  for (int64_t i = thread; i < (rows.end - rows.begin) * width; i += threads) {
    const int64_t row = i / width;
    const Query query = task.query(plane, rows.begin + row);
    const bool attended =
        attends(task.rule, query, task.key(query.batch, columns.begin + (i - row * width)));
    answer.some = answer.some || attended;
    answer.all = answer.all && attended;
    if (answer.some && !answer.all) {
      break;
    }
  }
  return answer;
}

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
    int64_t place = before;                        // of the next block that is listed
    int64_t behind = count + part.begin - before;  // of the next that is not
    ATTN_MASK_ONE_BY_ONE
    for (int64_t block = part.begin; block < part.end; ++block) {
      const int64_t to = holds(block) ? place++ : behind++;
      if (to < width) {
        lists.indices[line * width + to] = static_cast<int32_t>(block);
      }
    }
    return count <= width;
  }
};

/// Lines of all kinds and both directions, one behind the other.
ATTN_MASK_INLINE int64_t listed_lines(const BlockMaskTask& task) {
  return task.planes() * (task.q_blocks() + task.kv_blocks()) * (task.separate_full ? 2 : 1);
}

ATTN_MASK_INLINE ListedLine listed_line(const BlockMaskTask& task, int64_t index) {
  const int64_t q_blocks = task.q_blocks();
  const int64_t kv_blocks = task.kv_blocks();
  const int64_t of_kind = task.planes() * (q_blocks + kv_blocks);
  const bool is_full = index >= of_kind;
  const int64_t in_kind = is_full ? index - of_kind : index;
  const int64_t plane = in_kind / (q_blocks + kv_blocks);
  const int64_t in_plane = in_kind - plane * (q_blocks + kv_blocks);
  const BlockState* const states = task.states + plane * q_blocks * kv_blocks;
  if (in_plane < q_blocks) {
    return {states + in_plane * kv_blocks,
            1,
            kv_blocks,
            task.kv_width,
            task.kv[is_full ? 1 : 0],
            task.stored(plane) * q_blocks + in_plane,
            is_full,
            !task.separate_full};
  }
  const int64_t column = in_plane - q_blocks;
  return {states + column,
          kv_blocks,
          q_blocks,
          task.q_width,
          task.q[is_full ? 1 : 0],
          task.stored(plane) * kv_blocks + column,
          is_full,
          !task.separate_full};
}

}  // namespace attn_mask
