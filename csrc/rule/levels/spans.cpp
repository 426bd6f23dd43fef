#include "rule/levels/spans.h"

#include "rule/levels/numbers.h"

namespace attn_mask {
namespace {

// Of runs that are shorter on average a row may be in any, unless its numbers are in order.
constexpr int64_t kLongRun = 16;

// The same lines find the spans of one row and how they move in the rows after it. In the second
// case borders are compared for all rows at once: `less` compares them in the first row and cuts
// `rows` to those in which it is the same.

/// Spans of one row.
struct OneRow {
  using Border = int64_t;
  using Interval = attn_mask::Interval;
  using Spans = attn_mask::Spans;
  using Result = RowSpans;
  static constexpr bool kMoves = false;

  static Border border(int64_t at, int64_t /*slope*/) { return at; }
  static int64_t at(Border border) { return border; }
  static int64_t slope(Border /*border*/) { return 0; }
  bool less(Border a, Border b) const { return a < b; }
  void limit(int64_t /*rows*/) const {}
};

/// Spans of rows, the position of whose queries goes up by 1 each.
struct ManyRows {
  using Border = MovingBorder;
  using Interval = MovingInterval;
  using Spans = MovingSpans;
  struct Result {
    MovingSpans spans;
    uint32_t unresolved;
  };
  static constexpr bool kMoves = true;

  int64_t rows;

  static Border border(int64_t at, int64_t slope) { return {at, slope}; }
  static int64_t at(Border border) { return border.at; }
  static int64_t slope(Border border) { return border.slope; }
  void limit(int64_t most) { rows = most < rows ? most : rows; }
  bool less(Border a, Border b) {
    const int64_t distance = b.at - a.at;
    if (distance > 0 && b.slope < a.slope) {
      limit(distance);
    } else if (distance <= 0 && b.slope > a.slope) {
      limit(1 - distance);
    }
    return distance > 0;
  }
};

/// Columns stand at `shift + column`, or are listed.
template <typename Rows>
struct Finder {
  using Border = typename Rows::Border;
  using Interval = typename Rows::Interval;
  using Spans = typename Rows::Spans;
  using Result = typename Rows::Result;

  const Rule& rule;
  const Query& query;
  const Positions& kv_positions;
  Rows rows;
  int64_t shift = kv_positions.at(query.batch, 0);

  Result leaf(int32_t index, Interval context);
  const NumberRow* numbers_in_order(int32_t index) const;
  Result by_numbers(int32_t index, Interval context) {
    return by_numbers(index, context, numbers_in_order(index));
  }
  Result by_numbers(int32_t index, Interval context, const NumberRow* keys);
  Result subtree(int32_t last, Interval context);

  static Interval interval(int64_t begin, int64_t end) {
    return {Rows::border(begin, 0), Rows::border(end, 0)};
  }

  bool is_empty(const Interval& interval) { return !rows.less(interval.begin, interval.end); }

  static Interval hull(const Spans& spans) {
    return spans.size == 0 ? interval(0, 0)
                           : Interval{spans.at[0].begin, spans.at[spans.size - 1].end};
  }

  static Result nothing() { return {Spans{}, 0}; }

  static Result unresolved(int32_t index, Interval context) {
    Spans spans{};
    spans.at[spans.size++] = context;
    return {spans, uint32_t{1} << index};
  }

  Interval overlap(const Interval& a, const Interval& b) {
    return {rows.less(b.begin, a.begin) ? a.begin : b.begin,
            rows.less(a.end, b.end) ? a.end : b.end};
  }

  /// Appends; false when that is one interval too many, which is then merged into the last.
  static bool append(Spans& spans, const Interval& interval) {
    if (spans.size == Spans::kMax) {
      spans.at[Spans::kMax - 1].end = interval.end;
      return false;
    }
    spans.at[spans.size++] = interval;
    return true;
  }

  /// Both give supersets; false when the result is one only.
  bool intersect(const Spans& a, const Spans& b, Spans& both) {
    both.size = 0;
    bool exact = true;
    for (int32_t i = 0, j = 0; i < a.size && j < b.size;) {
      const Interval common = overlap(a.at[i], b.at[j]);
      if (!is_empty(common)) {
        exact = append(both, common) && exact;
      }
      (rows.less(a.at[i].end, b.at[j].end) ? i : j)++;
    }
    return exact;
  }

  bool unite(const Spans& a, const Spans& b, Spans& either) {
    either.size = 0;
    bool exact = true;
    for (int32_t i = 0, j = 0; i < a.size || j < b.size;) {
      const bool from_a = j == b.size || (i < a.size && !rows.less(b.at[j].begin, a.at[i].begin));
      const Interval next = from_a ? a.at[i++] : b.at[j++];
      if (either.size > 0 && !rows.less(either.at[either.size - 1].end, next.begin)) {
        Border& end = either.at[either.size - 1].end;
        end = rows.less(end, next.end) ? next.end : end;
      } else {
        exact = append(either, next) && exact;
      }
    }
    return exact;
  }
};

/// A leaf's spans within the columns of `context`, which is not empty.
template <typename Rows>
auto Finder<Rows>::leaf(int32_t index, Interval context) -> Result {
  const Rule::Node& node = rule.nodes[index];
  if (kv_positions.listed) {  // neighbours in memory need not be neighbours
    return by_numbers(index, context);
  }
  // Within `seen` the leaf sees keys at `to_leaf + column`, as long as each step moves all of them
  // alike.
  Interval seen = context;
  int64_t q = query.position;
  int64_t to_leaf = shift;
  for (int32_t i = node.step_begin; i < node.step_end; ++i) {
    const Rule::Step& step = rule.steps[i];
    const Table& table = step.table;
    if (!table.exists()) {
      q += step.q_add;
      to_leaf += step.key_add;
      continue;
    }
    if (!table.holds(q)) {
      rows.limit(q < 0 ? -q : kOpen);
      return nothing();
    }
    // No key outside the table is seen; a table may be short beside the mask.
    seen = overlap(seen, interval(-to_leaf, table.length - to_leaf));
    if (is_empty(seen)) {
      return nothing();
    }
    const int64_t row = table.row(query.batch);
    if (table.runs.starts == nullptr) {
      return by_numbers(index, seen);
    }
    if (!Rows::kMoves && table.length < kLongRun * table.runs.count(row)) {
      if (const NumberRow* const keys = numbers_in_order(index)) {
        return by_numbers(index, seen, keys);
      }
    }
    const int64_t first = to_leaf + Rows::at(seen.begin);
    const int64_t run_end = table.runs.around(row, first).end;
    const int64_t spare = run_end - (to_leaf + Rows::at(seen.end));
    if (spare < 0) {
      rows.limit(Rows::slope(seen.begin) == 0 ? kOpen : run_end - first);
      return by_numbers(index, seen);
    }
    if constexpr (Rows::kMoves) {
      rows.limit(Rows::slope(seen.end) == 0 ? kOpen : spare + 1);
      rows.limit(table.runs.around(row, q).end - q);
    }
    q = table.position_at(query.batch, q);
    to_leaf += table.position_at(query.batch, first) - first;
  }
  const Query seen_by{query.batch, query.head, query.row, q};
  const LeafRow row = visit_leaf(node, [&](const auto& of) { return of.row(seen_by); });
  rows.limit(row.rows);
  if (row.keys.empty()) {
    return nothing();
  }
  if (row.keys.begin != kEverywhere.begin || row.keys.end != kEverywhere.end) {
    seen = overlap(seen, {Rows::border(row.keys.begin - to_leaf, row.begin_slope),
                          Rows::border(row.keys.end - to_leaf, row.end_slope)});
    if (is_empty(seen)) {
      return nothing();
    }
  }
  return {unresolved(index, seen).spans, row.exact ? 0 : uint32_t{1} << index};
}

/// The numbers of a leaf's columns where they are in order, else null.
template <typename Rows>
const NumberRow* Finder<Rows>::numbers_in_order(int32_t index) const {
  const NumberRow* const keys =
      rule.numbers == nullptr ? nullptr : rule.numbers->row(index, query.batch);
  return keys != nullptr && keys->order != 0 ? keys : nullptr;
}

/// A leaf's spans by its columns' numbers, if they are in order. Those of each row are its own.
template <typename Rows>
auto Finder<Rows>::by_numbers(int32_t index, Interval context, const NumberRow* keys) -> Result {
  NumberRange range{};
  if (keys == nullptr || !rule.numbers->find_range(index, *keys, query, range)) {
    return unresolved(index, context);
  }
  rows.limit(1);
  const attn_mask::Interval found = range.empty() ? attn_mask::Interval{0, 0} : keys->find(range);
  const Interval seen = overlap(context, interval(found.begin, found.end));
  return is_empty(seen) ? nothing() : Result{unresolved(index, seen).spans, 0};
}

template <typename Rows>
auto Finder<Rows>::subtree(int32_t last, Interval context) -> Result {
  if (is_empty(context)) {
    return nothing();
  }
  const Rule::Node& node = rule.nodes[last];
  if (node.kind != Rule::Kind::kAnd && node.kind != Rule::Kind::kOr) {
    return leaf(last, context);
  }
  const int32_t right_last = last - 1;
  const int32_t left_last = rule.nodes[right_last].first - 1;
  const Result left = subtree(left_last, context);
  Result result{};
  if (node.kind == Rule::Kind::kAnd) {
    // The right side is only evaluated where the left allows something: within one document, say,
    // positions that begin anew with each document go up by one.
    const Result right = subtree(right_last, hull(left.spans));
    const bool exact = intersect(left.spans, right.spans, result.spans);
    result.unresolved = exact ? left.unresolved | right.unresolved : uint32_t{1} << last;
  } else {
    const Result right = subtree(right_last, context);
    const bool exact = unite(left.spans, right.spans, result.spans) && left.unresolved == 0 &&
                       right.unresolved == 0;
    result.unresolved = exact ? 0 : uint32_t{1} << last;
  }
  if (result.spans.size == 0) {
    result.unresolved = 0;
  }
  return result;
}

}  // namespace

RowSpans leaf_spans(const Rule& rule, int32_t leaf, const Query& query,
                    const Positions& kv_positions, Interval context) {
  return Finder<OneRow>{rule, query, kv_positions, {}}.leaf(leaf, context);
}

RowSpans row_spans(const Rule& rule, const Query& query, const Positions& kv_positions,
                   int64_t kv_length) {
  return Finder<OneRow>{rule, query, kv_positions, {}}.subtree(rule.size - 1, {0, kv_length});
}

RowRun row_run(const Rule& rule, const Query& query, const Positions& q_positions,
               const Positions& kv_positions, int64_t kv_length, int64_t max_rows) {
  using Many = Finder<ManyRows>;
  const int32_t last = rule.size - 1;
  const MovingInterval all = Many::interval(0, kv_length);
  int64_t in_line = 1;  // rows whose positions go up by 1
  while (in_line < max_rows &&
         (!q_positions.listed ||
          q_positions.at(query.batch, query.row + in_line) == query.position + in_line)) {
    in_line = q_positions.listed ? in_line + 1 : max_rows;
  }
  Many finder{rule, query, kv_positions, {in_line}};
  const ManyRows::Result result = finder.subtree(last, all);
  return {result.spans, result.unresolved, finder.rows.rows};
}

}  // namespace attn_mask
