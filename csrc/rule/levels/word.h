#pragma once

// Word level: which of up to 64 consecutive columns a row attends to, as bits. Intervals of keys
// are written at once; a leaf whose table was not prepared is evaluated key by key.

#include <utility>

#include "rule/levels/hull.h"

namespace attn_mask {

/// Columns that stand at consecutive positions, as one leaf sees them.
struct KeyRun {
  int64_t position;  // of the first
  int64_t length;    // > 0
  bool exists;       // the leaf's tables hold these positions
};

/// The run that begins at `column` and has at most `at_most` columns.
ATTN_MASK_INLINE KeyRun key_run(const Rule& rule, const Rule::Node& leaf, int64_t batch,
                                const Positions& kv_positions, int64_t column, int64_t at_most) {
  KeyRun run{kv_positions.at(batch, column), kv_positions.listed ? 1 : at_most, true};
  for (int32_t i = leaf.step_begin; i < leaf.step_end; ++i) {
    const Rule::Step& step = rule.steps[i];
    const Table& table = step.table;
    if (!table.exists()) {
      run.position += step.key_add;
      continue;
    }
    int64_t length = 1;
    if (!table.holds(run.position)) {
      run.exists = false;
      length = run.position < 0 ? -run.position : run.length;
    } else if (table.bounds.begin != nullptr) {
      length = table.run(batch, run.position).end - run.position;
    }
    run.length = length < run.length ? length : run.length;
    if (!run.exists) {
      break;
    }
    run.position = table.position_at(batch, run.position);
  }
  return run;
}

/// Where a leaf sees the query; false where its tables do not hold it.
ATTN_MASK_INLINE bool find_query(const Rule& rule, const Rule::Node& leaf, int64_t batch,
                                 int64_t& position) {
  for (int32_t i = leaf.step_begin; i < leaf.step_end; ++i) {
    const Rule::Step& step = rule.steps[i];
    if (!step.table.exists()) {
      position += step.q_add;
    } else if (step.table.holds(position)) {
      position = step.table.position_at(batch, position);
    } else {
      return false;
    }
  }
  return true;
}

/// Which of `count` keys from `first` on a leaf lets the query attend to, all where the leaf sees
/// them; bits beyond them may be anything.
ATTN_MASK_INLINE uint64_t leaf_word(const Leaf& leaf, const Query& query, const Key& first,
                                    int64_t count) {
  return visit_leaf(
      leaf, [&](const auto& of) ATTN_MASK_INLINE_LAMBDA { return of.word(query, first, count); });
}

/// Instead of keys that are no interval, or of which it is not known.
ATTN_MASK_INLINE Interval no_interval() { return {INT64_MAX, 0}; }
ATTN_MASK_INLINE bool is_interval(const Interval& keys) { return keys.begin != INT64_MAX; }

/// The positions of the keys that a leaf lets the query attend to, all where the leaf sees them; or
/// no_interval().
ATTN_MASK_INLINE Interval leaf_keys(const Leaf& leaf, const Query& query) {
  return visit_leaf(leaf, [&](const auto& of) ATTN_MASK_INLINE_LAMBDA -> Interval {
    if constexpr (std::is_same_v<std::decay_t<decltype(of)>, SameId>) {
      return of.has_run(query.batch) ? of.run(query) : no_interval();
    } else {
      const LeafRow row = of.row(query);
      return row.exact ? row.keys : no_interval();
    }
  });
}

/// Which of `columns`, at most 64 and at least one, a leaf lets the query attend to, where the leaf
/// has positions of its own or columns are listed; bit 0 is the first. Bits beyond them may be
/// anything.
ATTN_MASK_INLINE uint64_t moved_leaf_word(const Rule& rule, const Rule::Node& leaf,
                                          const Query& query, const Positions& kv_positions,
                                          Interval columns) {
  Query at = query;
  if (!find_query(rule, leaf, query.batch, at.position)) {
    return 0;
  }
  uint64_t word = 0;
  ATTN_MASK_ONE_BY_ONE
  for (int64_t column = columns.begin; column < columns.end;) {
    const KeyRun run = key_run(rule, leaf, query.batch, kv_positions, column, columns.end - column);
    if (run.exists) {
      const uint64_t of_run = leaf_word(leaf, at, {column, run.position}, run.length);
      word |= (of_run & low_bits(run.length)) << (column - columns.begin);
    }
    column += run.length;
  }
  return word;
}

/// Words that wait for their `and` or `or`, in memory of the thread's own: a register array that is
/// indexed would be local memory on a GPU.
struct WordStack {
  uint64_t* words;  // [WordPlan::depth], `step` apart
  int64_t step;
};

/// A leaf to be evaluated and joined to what there is, or what waits to be joined to it.
struct WordStep {
  enum Join : uint32_t { kNew, kAnd, kOr, kWaiting };  // kNew: what there is waits

  uint8_t code;

  ATTN_MASK_INLINE uint32_t join() const { return code & 3; }
  ATTN_MASK_INLINE bool is_leaf() const { return join() != kWaiting; }
  /// Of a leaf: it has positions of its own, or columns are listed.
  ATTN_MASK_INLINE bool is_moved() const { return (code & 4) != 0; }
  /// What waits is joined by `or`.
  ATTN_MASK_INLINE bool by_or() const { return (code & 4) != 0; }
  ATTN_MASK_INLINE int32_t node() const { return code >> 3; }
};

/// What of a rule is worked out for each word: all but the leaves that its rows' hulls cover. Made
/// on the host.
struct WordPlan {
  WordStep steps[Rule::kMaxNodes];
  int16_t size;
  int16_t depth;  // how many words wait at once

  WordPlan() = default;

  WordPlan(const Rule& rule, const Hull& hull, const Positions& kv_positions) : size(0), depth(0) {
    add(rule, hull, rule.size - 1, kv_positions.listed);
    int16_t waiting = -1;
    for (int16_t i = 0; i < size; ++i) {
      const uint32_t join = steps[i].join();
      waiting = static_cast<int16_t>(waiting + (join == WordStep::kNew       ? 1
                                                : join == WordStep::kWaiting ? -1
                                                                             : 0));
      depth = waiting > depth ? waiting : depth;
    }
  }

 private:
  /// Adds the subtree that ends with node `last`; false where nothing of it is left.
  bool add(const Rule& rule, const Hull& hull, int32_t last, bool listed) {
    const Rule::Node& node = rule.nodes[last];
    if (node.kind == Rule::Kind::kAnd || node.kind == Rule::Kind::kOr) {
      const bool by_or = node.kind == Rule::Kind::kOr;
      int32_t right = last - 1;
      int32_t left = rule.nodes[right].first - 1;
      if (rule.nodes[left].first == left) {
        std::swap(left, right);  // a leaf comes last, so that nothing waits for it
      }
      const bool has_left = add(rule, hull, left, listed);
      const int16_t before = size;
      if (!add(rule, hull, right, listed) || !has_left) {
        return has_left || size > before;  // the other one holds within the hull
      }
      if (size == before + 1) {
        steps[before].code |= by_or ? WordStep::kOr : WordStep::kAnd;
      } else {
        steps[size++] = {static_cast<uint8_t>(WordStep::kWaiting | (by_or ? 4 : 0))};
      }
      return true;
    }
    const bool is_moved = node.step_begin != node.step_end || listed;
    if (!is_moved && hull.says_all_of(rule, last)) {
      return false;
    }
    steps[size++] = {static_cast<uint8_t>((is_moved ? 4 : 0) | last << 3)};
    return true;
  }
};

/// The hull of a row.
struct RowHull {
  Interval positions;  // the query attends to no key outside of it
  bool exact;          // and to every key within
};

/// With what the prepare step on a device left for ids. It goes upwards with queries.
ATTN_MASK_INLINE RowHull row_hull(const Rule& rule, const Hull& hull, const WordPlan& plan,
                                  const Query& query) {
  RowHull row{hull.keys(rule, query), true};
  ATTN_MASK_ONE_BY_ONE
  for (int32_t i = 0; i < plan.size; ++i) {
    const WordStep step = plan.steps[i];
    if (!step.is_leaf()) {
      continue;
    }
    const Rule::Node& node = rule.nodes[step.node()];
    if (!step.is_moved() && node.conjunct && node.kind == Rule::Kind::kSameId &&
        node.same_id.has_run(query.batch)) {
      row.positions = intersect(row.positions, node.same_id.run(query));
    } else {
      row.exact = false;
    }
  }
  return row;
}

/// What all words of a row share.
struct WordRow {
  Query query;
  Interval keys;      // positions beyond which it attends to none; all where columns are listed
  int64_t first_key;  // the position of column 0; 0 where they are listed

  ATTN_MASK_INLINE static WordRow of(const Rule& rule, const Hull& hull, const WordPlan& plan,
                                     const Query& query, const Positions& kv_positions) {
    if (kv_positions.listed) {
      return {query, kEverywhere, 0};
    }
    return {query, row_hull(rule, hull, plan, query).positions, kv_positions.at(query.batch, 0)};
  }
};

/// What step `index` of the plan lets the row's query attend to, worked out once for all words of
/// the row.
ATTN_MASK_INLINE Interval step_keys(const Rule& rule, const WordPlan& plan, const Query& query,
                                    int32_t index) {
  const WordStep step = plan.steps[index];
  return step.is_leaf() && !step.is_moved() ? leaf_keys(rule.nodes[step.node()], query)
                                            : no_interval();
}

/// Which of `columns`, at most 64 and at least one, the row's query attends to; bit 0 is the first.
/// Bits beyond them are 0. `keys_of(i)`: step_keys of step i, or no_interval().
template <typename KeysOf>
ATTN_MASK_INLINE uint64_t row_word(const Rule& rule, const WordPlan& plan, const WordRow& row,
                                   const Positions& kv_positions, Interval columns,
                                   const WordStack& stack, const KeysOf& keys_of) {
  const int64_t count = columns.end - columns.begin;
  const int64_t key = row.first_key + columns.begin;
  uint64_t hull = kv_positions.listed ? ~uint64_t{0} : word_of(row.keys, key);
  if (count < kWordSize) {
    hull &= low_bits(count);
  }
  if (hull == 0 || plan.size == 0) {
    return hull;
  }
  uint64_t* waiting = stack.words;  // past the last
  uint64_t top = ~uint64_t{0};
  ATTN_MASK_ONE_BY_ONE
  for (int32_t i = 0; i < plan.size; ++i) {
    const WordStep step = plan.steps[i];
    const uint32_t join = step.join();
    if (join == WordStep::kAnd && top == 0) {
      continue;
    }
    const Interval keys = keys_of(i);
    uint64_t word;
    if (is_interval(keys)) {
      word = word_of(keys, key);
    } else if (join != WordStep::kWaiting) {
      const Rule::Node& leaf = rule.nodes[step.node()];
      word = step.is_moved() ? moved_leaf_word(rule, leaf, row.query, kv_positions, columns)
                             : leaf_word(leaf, row.query, {columns.begin, key}, count);
    } else {
      waiting -= stack.step;
      top = step.by_or() ? top | *waiting : top & *waiting;
      continue;
    }
    if (join == WordStep::kAnd) {
      top &= word;
    } else if (join == WordStep::kOr) {
      top |= word;
    } else {
      if (i > 0) {
        *waiting = top;
        waiting += stack.step;
      }
      top = word;
    }
  }
  return hull & top;
}

/// Whether no leaf is evaluated key by key (but for ids of which the prepare step finds that one
/// has several runs).
inline bool has_words(const Rule& rule, const Positions& kv_positions) {
  bool all = !kv_positions.listed;
  for (int32_t i = 0; i < rule.size; ++i) {
    const Rule::Node& node = rule.nodes[i];
    all = all && (node.kind != Rule::Kind::kSameId || node.same_id.ids.bounds.begin != nullptr) &&
          (node.kind != Rule::Kind::kPadding || node.padding.element_size == Padding::kBits);
  }
  for (int32_t i = 0; i < rule.steps_size; ++i) {
    const Table& table = rule.steps[i].table;
    all = all && (!table.exists() || table.bounds.begin != nullptr);
  }
  return all;
}

}  // namespace attn_mask
