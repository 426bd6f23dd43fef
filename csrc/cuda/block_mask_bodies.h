#pragma once

// What one thread of each kernel of block masks does; see bodies.h.

#include "cuda/bodies.h"
#include "format/block_mask.h"

namespace attn_mask {

/// What hulls tell of the blocks of some rows.
struct LineHull {
  Interval some;  // no row sees a column outside of it
  Interval all;   // every row sees every column within
  bool is_known;

  /// Hulls go upwards with the query, so that those of the first and the last row tell where those
  /// between them lie.
  ATTN_MASK_INLINE LineHull(const BlockMaskParams& params, int64_t plane, Interval rows)
      : is_known(!params.q_positions.listed && !params.kv_positions.listed) {
    const Hull hull(params.rule);
    const Query query = params.query(plane, rows.begin);
    const Interval first = hull.keys(params.rule, query);
    const Interval last = hull.keys(params.rule, params.query(plane, rows.end - 1));
    const int64_t shift = params.kv_positions.at(query.batch, 0);
    const bool is_whole = hull.is_exact() && rows.end - rows.begin == params.q_block;
    some = {first.begin - shift, last.end - shift};
    all = is_whole ? Interval{last.begin - shift, first.end - shift} : Interval{0, 0};
  }

  ATTN_MASK_INLINE BlockState guess(const BlockMaskParams& params, Interval columns) const {
    if (!is_known) {
      return BlockState::kUnknown;
    }
    if (intersect(columns, some).empty()) {
      return BlockState::kEmpty;
    }
    const bool is_full = columns.end - columns.begin == params.kv_block &&
                         all.begin <= columns.begin && columns.end <= all.end;
    return is_full ? BlockState::kFull : BlockState::kUnknown;
  }
};

/// Of one line of blocks, the states that hulls tell; for one thread of the line's.
ATTN_MASK_INLINE void guess_line_body(const BlockMaskParams& params, int64_t line, int64_t thread,
                                      int64_t threads) {
  const int64_t q_blocks = params.q_blocks();
  const int64_t kv_blocks = params.kv_blocks();
  const int64_t plane = line / q_blocks;
  const LineHull hull(params, plane, params.rows_of(line - plane * q_blocks));
  ATTN_MASK_ONE_BY_ONE
  for (int64_t block = thread; block < kv_blocks; block += threads) {
    params.states[line * kv_blocks + block] = hull.guess(params, params.columns_of(block));
  }
}

/// What the elements of a block say, as far as one thread evaluates them.
struct BlockContent {
  bool some;
  bool all;
};

ATTN_MASK_INLINE BlockContent evaluate_block_body(const BlockMaskParams& params, int64_t line,
                                                  int64_t block, int64_t thread, int64_t threads) {
  const int64_t q_blocks = params.q_blocks();
  const int64_t plane = line / q_blocks;
  const Interval rows = params.rows_of(line - plane * q_blocks);
  const Interval columns = params.columns_of(block);
  const int64_t width = columns.end - columns.begin;
  BlockContent found{false, rows.end - rows.begin == params.q_block && width == params.kv_block};
  ATTN_MASK_ONE_BY_ONE
  for (int64_t i = thread; i < (rows.end - rows.begin) * width; i += threads) {
    const int64_t row = i / width;
    const Query query = params.query(plane, rows.begin + row);
    const bool attended =
        attends(params.rule, query, params.key(query.batch, columns.begin + (i - row * width)));
    found.some = found.some || attended;
    found.all = found.all && attended;
    if (found.some && !found.all) {
      break;
    }
  }
  return found;
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

/// Lines of all kinds and both directions, one after the other.
ATTN_MASK_INLINE int64_t listed_lines(const BlockMaskParams& params) {
  return params.planes() * (params.q_blocks() + params.kv_blocks()) *
         (params.separate_full ? 2 : 1);
}

ATTN_MASK_INLINE ListedLine listed_line(const BlockMaskParams& params, int64_t index) {
  const int64_t q_blocks = params.q_blocks();
  const int64_t kv_blocks = params.kv_blocks();
  const int64_t of_kind = params.planes() * (q_blocks + kv_blocks);
  const bool is_full = index >= of_kind;
  const int64_t in_kind = is_full ? index - of_kind : index;
  const int64_t plane = in_kind / (q_blocks + kv_blocks);
  const int64_t in_plane = in_kind - plane * (q_blocks + kv_blocks);
  const BlockState* const states = params.states + plane * q_blocks * kv_blocks;
  if (in_plane < q_blocks) {
    return {states + in_plane * kv_blocks,
            1,
            kv_blocks,
            params.kv_width,
            params.kv[is_full ? 1 : 0],
            params.stored(plane) * q_blocks + in_plane,
            is_full,
            !params.separate_full};
  }
  const int64_t column = in_plane - q_blocks;
  return {states + column,
          kv_blocks,
          q_blocks,
          params.q_width,
          params.q[is_full ? 1 : 0],
          params.stored(plane) * kv_blocks + column,
          is_full,
          !params.separate_full};
}

}  // namespace attn_mask
