#pragma once

// What one thread of each kernel of block masks does; see bodies.h.

#include <algorithm>

#include "bits.h"
#include "cuda/bodies.h"
#include "format/block_mask.h"
#include "rule/levels/word.h"
#include "rule/math/divisor.h"

namespace attn_mask {

/// All that the kernel of states is given. A warp takes a part of a line, 32 blocks at a time.
struct BlockStatesLaunch {
  BlockMaskParams params;
  int64_t q_blocks;
  int64_t kv_blocks;
  int64_t row_words;  // words to a row of a block
  int64_t parts;      // of a line
  int64_t part_size;  // blocks
  Divisor by_parts;
  Divisor by_q_blocks;
  Divisor by_heads;
  Divisor by_kv_block;
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
        by_kv_block(params.kv_block),
        by_row_words(row_words),
        hull(params.rule),
        plan(params.rule, hull, params.kv_positions) {
    constexpr int64_t kEnough = 8192;  // warps that fill any present GPU
    const int64_t groups = (kv_blocks + kLanes - 1) / kLanes;
    const int64_t most = std::clamp<int64_t>(kEnough / lines(), 1, groups);
    part_size = (groups + most - 1) / most * kLanes;
    parts = (kv_blocks + part_size - 1) / part_size;
    by_parts = Divisor(parts);
  }

  ATTN_MASK_INLINE int64_t lines() const { return params.planes() * q_blocks; }
};

static_assert(sizeof(BlockStatesLaunch) <= 4096, "kernel parameters");

/// What the elements of a block hold, as far as they have been evaluated.
struct BlockContent {
  bool some;
  bool all;

  ATTN_MASK_INLINE bool is_mixed() const { return some && !all; }
  ATTN_MASK_INLINE BlockState state() const {
    return all ? BlockState::kFull : some ? BlockState::kPartial : BlockState::kEmpty;
  }
};

/// What two rules leave of a block under `and` (`identity` kFull) or `or` (kEmpty).
ATTN_MASK_INLINE BlockState join(BlockState a, BlockState b, BlockState identity) {
  const BlockState decides = identity == BlockState::kFull ? BlockState::kEmpty : BlockState::kFull;
  return a == identity                  ? b
         : b == identity                ? a
         : a == decides || b == decides ? decides
                                        : BlockState::kUnknown;
}

/// Columns that some of a line's queries may attend to, and such that all of them do.
struct LineKeys {
  Interval some;
  Interval all;

  ATTN_MASK_INLINE BlockState state(Interval columns) const {
    return intersect(columns, some).empty()                       ? BlockState::kEmpty
           : all.begin <= columns.begin && columns.end <= all.end ? BlockState::kFull
                                                                  : BlockState::kUnknown;
  }
};

/// The blocks of some queries of a plane.
struct BlockLine {
  const BlockStatesLaunch& launch;
  int64_t batch;
  int64_t head;
  Interval rows;
  int64_t shift;  // the position of column 0
  Query first;    // of the line's rows
  Query last;
  Interval some;  // blocks beyond which all are empty
  Interval full;  // blocks that the hull fills
  BlockState* states;

  ATTN_MASK_INLINE BlockLine(const BlockStatesLaunch& of, int64_t index) : launch(of) {
    const BlockMaskParams& params = launch.params;
    const int64_t plane = launch.by_q_blocks.divide(index);
    batch = launch.by_heads.divide(plane);
    head = plane - batch * params.heads;
    rows = params.rows_of(index - plane * launch.q_blocks);
    states = params.states + index * launch.kv_blocks;
    shift = params.kv_positions.at(batch, 0);
    first = query(rows.begin);
    last = query(rows.end - 1);
    some = {0, launch.kv_blocks};
    full = {0, 0};
    if (is_known()) {
      const Interval every{0, params.kv_length};
      const RowHull hulls[] = {row_hull(params.rule, launch.hull, launch.plan, first),
                               row_hull(params.rule, launch.hull, launch.plan, last)};
      const Interval reached = between(hulls[0].positions, hulls[1].positions).some;
      const Interval within = intersect(reached, every);
      some = within.empty() ? Interval{0, 0}
                            : Interval{launch.by_kv_block.divide(within.begin),
                                       launch.by_kv_block.divide(within.end - 1) + 1};
      const Interval filled = intersect(
          between(launch.hull.keys(params.rule, first), launch.hull.keys(params.rule, last)).all,
          every);
      if (!filled.empty()) {
        // A block that reaches beyond the mask is as full as can be.
        full = {launch.by_kv_block.divide(filled.begin + params.kv_block - 1),
                filled.end == every.end ? launch.kv_blocks : launch.by_kv_block.divide(filled.end)};
      }
    }
  }

  /// What is known of step `index` of the plan, for one lane to work out.
  ATTN_MASK_INLINE LineKeys keys_body(int32_t index) const {
    const Rule& rule = launch.params.rule;
    const Rule::Node& node = rule.nodes[launch.plan.steps[index].node()];
    const bool rises = node.kind == Rule::Kind::kSameId || node.kind == Rule::Kind::kChunk ||
                       visit_leaf(node, [](const auto& leaf) ATTN_MASK_INLINE_LAMBDA {
                         return std::decay_t<decltype(leaf)>::kIsBand;
                       });
    const Interval of_first = step_keys(rule, launch.plan, first, index);
    const Interval of_last = step_keys(rule, launch.plan, last, index);
    return rises && is_interval(of_first) && is_interval(of_last) ? between(of_first, of_last)
                                                                  : LineKeys{kEverywhere, {0, -1}};
  }

  /// The state of a block as far as it is known without its elements. `keys`: of each step.
  ATTN_MASK_INLINE BlockState guess_body(int64_t block, const LineKeys* keys) const {
    if (!some.contains(block)) {
      return BlockState::kEmpty;
    }
    if (!is_known()) {
      return BlockState::kUnknown;
    }
    BlockState state = full.contains(block) ? BlockState::kFull : BlockState::kUnknown;
    if (launch.plan.size > 0) {
      state = join(state, guess_plan(block, keys), BlockState::kFull);
    }
    return state == BlockState::kFull && !is_whole(block) ? BlockState::kPartial : state;
  }

  /// Whether all elements of a block exist.
  ATTN_MASK_INLINE bool is_whole(int64_t block) const {
    const BlockMaskParams& params = launch.params;
    return rows.end - rows.begin == params.q_block &&
           (block + 1) * params.kv_block <= params.kv_length;
  }

  /// How many words a block has.
  ATTN_MASK_INLINE int64_t words() const { return (rows.end - rows.begin) * launch.row_words; }

  /// What word `index` of a block holds.
  ATTN_MASK_INLINE BlockContent word_body(int64_t block, int64_t index,
                                          const WordStack& stack) const {
    const BlockMaskParams& params = launch.params;
    const int64_t row = launch.by_row_words.divide(index);
    const Interval of_block = params.columns_of(block);
    const int64_t begin = of_block.begin + (index - row * launch.row_words) * kWordSize;
    const Interval columns = intersect({begin, begin + kWordSize}, of_block);
    if (index >= words() || columns.empty()) {
      return {false, true};
    }
    const WordRow of_row = WordRow::of(params.rule, launch.hull, launch.plan,
                                       query(rows.begin + row), params.kv_positions);
    const uint64_t word =
        row_word(params.rule, launch.plan, of_row, params.kv_positions, columns, stack,
                 [](int32_t) ATTN_MASK_INLINE_LAMBDA { return no_interval(); });
    return {word != 0, word == low_bits(columns.end - columns.begin)};
  }

 private:
  ATTN_MASK_INLINE bool is_known() const {
    return !launch.params.q_positions.listed && !launch.params.kv_positions.listed;
  }

  ATTN_MASK_INLINE Query query(int64_t row) const {
    return {batch, head, row, launch.params.q_positions.at(batch, row)};
  }

  /// Of keys that go upwards with the query, so that those of the first and the last row bound
  /// those between them.
  ATTN_MASK_INLINE LineKeys between(Interval of_first, Interval of_last) const {
    return {{of_first.begin - shift, of_last.end - shift},
            {of_last.begin - shift, of_first.end - shift}};
  }

  ATTN_MASK_INLINE BlockState guess_plan(int64_t block, const LineKeys* keys) const {
    const Interval columns = launch.params.columns_of(block);
    uint64_t waiting = 0;  // states, two bits each
    ATTN_MASK_ONE_BY_ONE
    for (int32_t i = 0; i < launch.plan.size; ++i) {
      const WordStep step = launch.plan.steps[i];
      BlockState state;
      if (step.is_leaf()) {
        const Rule::Node& leaf = launch.params.rule.nodes[step.node()];
        const bool of_keys = !step.is_moved() && leaf.kind == Rule::Kind::kPadding &&
                             leaf.padding.q_stride == 0 && launch.row_words <= kMostWords;
        state = of_keys ? padding_state(leaf.padding, columns) : keys[i].state(columns);
      } else {
        state = static_cast<BlockState>(waiting & 3);
        waiting >>= 2;
      }
      if (step.join() != WordStep::kNew) {
        const bool by_or = step.is_leaf() ? step.join() == WordStep::kOr : step.by_or();
        state = join(state, static_cast<BlockState>(waiting & 3),
                     by_or ? BlockState::kEmpty : BlockState::kFull);
        waiting >>= 2;
      }
      waiting = waiting << 2 | static_cast<uint64_t>(state);
    }
    return static_cast<BlockState>(waiting & 3);
  }

  /// What a padding leaves of the keys in `columns`, for all queries alike.
  ATTN_MASK_INLINE BlockState padding_state(const Padding& padding, Interval columns) const {
    BlockContent content{false, true};
    ATTN_MASK_ONE_BY_ONE
    for (int64_t begin = columns.begin; begin < columns.end; begin += kWordSize) {
      const int64_t count = columns.end - begin < kWordSize ? columns.end - begin : kWordSize;
      const uint64_t all = low_bits(count);
      const uint64_t word = padding.word(first, {begin, shift + begin}, count) & all;
      content = {content.some || word != 0, content.all && word == all};
    }
    return content.state();
  }

  static constexpr int64_t kMostWords = 16;  // of a row of a block, for one lane to read
};

/// Some neighbouring lines of one direction, of which the blocks are to be listed.
struct LineGroup {
  const BlockState* first;
  int64_t line_step;   // from the states of a line to those of the next
  int64_t block_step;  // from a state of a line to the next
  int64_t lines;
  int64_t total;  // blocks of a line
  int64_t width;
  int64_t stored;  // where the first line is stored
  const BlockLists* lists;
  bool separate_full;

  /// Whether a block is listed as one of `kind`: 0 partial, 1 full.
  ATTN_MASK_INLINE bool holds(int64_t kind, BlockState state) const {
    return kind == 1
               ? state == BlockState::kFull
               : state == BlockState::kPartial || (!separate_full && state == BlockState::kFull);
  }

  ATTN_MASK_INLINE BlockState state(int64_t line, int64_t block) const {
    return line < lines && block < total ? first[line * line_step + block * block_step]
                                         : BlockState::kEmpty;
  }

  /// Lists block `begin + lane` of a line, or leaves it to those that are not of the kind. `bits`:
  /// which of the 32 from `begin` on are; `before`: how many before them; `count`: how many in all.
  ATTN_MASK_INLINE void list_body(int64_t kind, int64_t line, int64_t begin, uint32_t bits,
                                  int64_t before, int64_t count, int64_t lane) const {
    const int64_t rank = before + count_bits(bits & static_cast<uint32_t>(low_bits(lane)));
    const int64_t block = begin + lane;
    const int64_t to = (bits >> lane & 1U) != 0 ? rank : count + block - rank;
    if (block < total && to < width) {
      lists[kind].indices[(stored + line) * width + to] = static_cast<int32_t>(block);
    }
  }

  /// Whether list_body has nothing to write for the 32 blocks from `begin` on.
  ATTN_MASK_INLINE bool is_beyond(int64_t begin, uint32_t bits, int64_t before,
                                  int64_t count) const {
    return (bits == 0 || before >= width) && count + begin - before >= width;
  }
};

/// All that the kernel of lists is given. Groups are of both directions, one after the other. Of a
/// line along the states one warp takes 32 blocks at a time; of lines across them 32 neighbours lie
/// beside each other.
struct BlockListsLaunch {
  static constexpr int64_t kAlong = kWarps;   // lines of a group
  static constexpr int64_t kAcross = kLanes;  // lines of a group

  BlockMaskParams params;
  int64_t q_blocks;
  int64_t kv_blocks;
  int64_t along;  // groups of a plane
  int64_t across;
  Divisor by_groups;  // of a plane
  Divisor by_heads;

  explicit BlockListsLaunch(const BlockMaskParams& of)
      : params(of),
        q_blocks(params.q_blocks()),
        kv_blocks(params.kv_blocks()),
        along((q_blocks + kAlong - 1) / kAlong),
        across((kv_blocks + kAcross - 1) / kAcross),
        by_groups(along + across),
        by_heads(params.heads) {}

  ATTN_MASK_INLINE int64_t groups() const { return params.planes() * (along + across); }

  ATTN_MASK_INLINE LineGroup group(int64_t index) const {
    const int64_t plane = by_groups.divide(index);
    const int64_t in_plane = index - plane * (along + across);
    const int64_t batch = by_heads.divide(plane);
    const int64_t stored = batch * params.stored_heads + plane - batch * params.heads;
    const BlockState* const states = params.states + plane * q_blocks * kv_blocks;
    if (in_plane < along) {
      const int64_t line = in_plane * kAlong;
      const int64_t lines = q_blocks - line < kAlong ? q_blocks - line : kAlong;
      return {states + line * kv_blocks,
              kv_blocks,
              1,
              lines,
              kv_blocks,
              params.kv_width,
              stored * q_blocks + line,
              params.kv,
              params.separate_full};
    }
    const int64_t line = (in_plane - along) * kAcross;
    const int64_t lines = kv_blocks - line < kAcross ? kv_blocks - line : kAcross;
    return {states + line,
            1,
            kv_blocks,
            lines,
            q_blocks,
            params.q_width,
            stored * kv_blocks + line,
            params.q,
            params.separate_full};
  }
};

static_assert(sizeof(BlockListsLaunch) <= 4096, "kernel parameters");

}  // namespace attn_mask
