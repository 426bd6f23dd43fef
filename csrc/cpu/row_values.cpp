#include "cpu/row_values.h"

#include <type_traits>

#include "cpu/isa.h"
#include "cpu/store.h"
#include "cpu/translate.h"
#include "rule/levels/numbers.h"
#include "rule/levels/spans.h"
#include "rule/levels/word.h"

namespace attn_mask::ATTN_MASK_ISA {
namespace {

/// Which of `n` keys from `key` on bear the query's id; the table holds all of them, and it.
void write_same_id(const Table& ids, const Query& query, int64_t key, int64_t n, uint8_t* out) {
  const int64_t of_batch = query.batch * ids.batch_stride;
  ids.numbers.visit([&](const auto* numbers) {
    const auto id = numbers[of_batch + query.position * ids.stride];
    const auto* of_key = numbers + of_batch + key * ids.stride;
    if (ids.stride == 1) {
      for (int64_t k = 0; k < n; ++k) {
        out[k] = of_key[k] == id;
      }
    } else {
      for (int64_t k = 0; k < n; ++k) {
        out[k] = of_key[k * ids.stride] == id;
      }
    }
  });
}

/// Which of `n` numbers lie within the range; 0 for each if it is empty.
void write_within(const int32_t* numbers, NumberRange range, int64_t n, uint8_t* out) {
  if (range.empty()) {
    fill<uint8_t>(out, n, 0);
    return;
  }
  const auto first = static_cast<uint32_t>(range.first);
  const uint32_t extent = static_cast<uint32_t>(range.last) - first;
  for (int64_t k = 0; k < n; ++k) {
    out[k] = static_cast<uint32_t>(numbers[k]) - first <= extent;
  }
}

/// Which of `n` keys from position `key` on a table moves into the interval of positions that a
/// leaf lets the query attend to; false where the leaf sees anything else.
bool write_moved(const Problem& problem, const Rule::Node& node, const Query& query, int64_t key,
                 int64_t n, uint8_t* out) {
  const Table& table = problem.rule.steps[node.step_begin].table;
  if (node.step_end - node.step_begin != 1 || !table.exists() || problem.kv_positions.listed) {
    return false;
  }
  fill<uint8_t>(out, n, 0);
  Query moved = query;
  if (!find_query(problem.rule, node, query.batch, moved.position)) {
    return true;
  }
  const LeafRow row = visit_leaf(node, [&](const auto& leaf) ATTN_MASK_INLINE_LAMBDA {
    // A search in runs is a function that instruction sets would share; these are spans already.
    if constexpr (std::is_same_v<decltype(leaf), const SameId&>) {
      return still_row(kEverywhere, /*exact=*/false);
    } else {
      return leaf.row(moved);
    }
  });
  if (!row.exact || row.keys.empty()) {
    return row.exact;
  }
  const Interval held = intersect({key, key + n}, {0, table.length});
  const auto first = static_cast<uint64_t>(row.keys.begin);
  const uint64_t extent = static_cast<uint64_t>(row.keys.end - 1) - first;
  table.numbers.visit([&](const auto* numbers) {
    const auto* const of_batch = numbers + query.batch * table.batch_stride;
    const auto write = [&](int64_t stride) ATTN_MASK_INLINE_LAMBDA {
      for (int64_t k = held.begin; k < held.end; ++k) {
        out[k - key] = static_cast<uint64_t>(within_far(of_batch[k * stride])) - first <= extent;
      }
    };
    // A stride that is known makes vector instructions of the loop.
    table.stride == 1 ? write(1) : write(table.stride);
  });
  return true;
}

void write_leaf(const Problem& problem, const Query& query, int32_t index, Interval columns,
                uint8_t* out) {
  const Rule::Node& node = problem.rule.nodes[index];
  const RowSpans row = leaf_spans(problem.rule, index, query, problem.kv_positions, columns);
  const bool plain = node.step_begin == node.step_end && !problem.kv_positions.listed;
  const int64_t shift = plain ? problem.kv_positions.at(query.batch, 0) : 0;
  const KeyNumbers* const of_keys = row.unresolved == 0 || plain ? nullptr : problem.rule.numbers;
  const NumberRow* keys = of_keys == nullptr ? nullptr : of_keys->row(index, query.batch);
  NumberRange range{};
  if (keys != nullptr && !of_keys->find_range(index, *keys, query, range)) {
    keys = nullptr;
  }
  int64_t written = columns.begin;
  for (int32_t i = 0; i < row.spans.size; ++i) {
    const Interval span = row.spans.at[i];
    uint8_t* const first = out + (span.begin - columns.begin);
    const int64_t n = span.end - span.begin;
    fill<uint8_t>(out + (written - columns.begin), span.begin - written, 0);
    written = span.end;
    if (row.unresolved == 0) {
      fill<uint8_t>(first, n, 1);
    } else if (plain && node.kind == Rule::Kind::kPadding) {
      const int64_t key = span.begin + (node.padding.by_column ? 0 : shift);
      translate<uint8_t>(node.padding, query, key, n, 1, 0, first);
    } else if (keys != nullptr) {
      write_within(keys->of_columns + span.begin, range, n, first);
    } else if (plain && node.kind == Rule::Kind::kSameId) {
      write_same_id(node.same_id.ids, query, span.begin + shift, n, first);
    } else if (plain ||
               !write_moved(problem, node, query,
                            problem.kv_positions.at(query.batch, 0) + span.begin, n, first)) {
      for (int64_t k = 0; k < n; ++k) {
        first[k] =
            leaf_attends(problem.rule, node, query, problem.key(query.batch, span.begin + k));
      }
    }
  }
  fill<uint8_t>(out + (written - columns.begin), columns.end - written, 0);
}

}  // namespace

const uint8_t* RowValues::of_subtree(const Problem& problem, const Query& query, int32_t last,
                                     Interval columns) {
  const int64_t n = columns.end - columns.begin;
  int32_t waiting = 0;
  for (int32_t i = problem.rule.nodes[last].first; i <= last; ++i) {
    const Rule::Kind kind = problem.rule.nodes[i].kind;
    if (kind != Rule::Kind::kAnd && kind != Rule::Kind::kOr) {
      write_leaf(problem, query, i, columns, stack_[waiting++]);
      continue;
    }
    const uint8_t* right = stack_[--waiting];
    uint8_t* left = stack_[waiting - 1];
    if (kind == Rule::Kind::kAnd) {
      for (int64_t k = 0; k < n; ++k) {
        left[k] &= right[k];
      }
    } else {
      for (int64_t k = 0; k < n; ++k) {
        left[k] |= right[k];
      }
    }
  }
  return stack_[0];
}

void RowValues::of_nodes(const Problem& problem, const Query& query, uint32_t nodes,
                         Interval columns, uint8_t* out) {
  const int64_t n = columns.end - columns.begin;
  fill<uint8_t>(out, n, 1);
  for (int32_t node = 0; node < problem.rule.size; ++node) {
    if (((nodes >> node) & 1U) != 0) {
      const uint8_t* const of_node = of_subtree(problem, query, node, columns);
      for (int64_t k = 0; k < n; ++k) {
        out[k] &= of_node[k];
      }
    }
  }
}

void evaluate(const Problem& problem, const Query& query, uint32_t nodes, Interval columns,
              uint8_t* out) {
  RowValues values;
  values.of_nodes(problem, query, nodes, columns, out);
}

}  // namespace attn_mask::ATTN_MASK_ISA
