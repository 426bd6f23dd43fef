#include "rule/spans.h"

namespace attn_mask {
namespace {

Spans spans_of(Interval interval) {
  Spans spans{};
  if (!interval.empty()) {
    spans.at[spans.size++] = interval;
  }
  return spans;
}

Interval hull(const Spans& spans) {
  return spans.size == 0 ? Interval{0, 0}
                         : Interval{spans.at[0].begin, spans.at[spans.size - 1].end};
}

/// Appends; false when that is one interval too many, which is then merged into the last.
bool append(Spans& spans, Interval interval) {
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
    const Interval overlap = intersect(a.at[i], b.at[j]);
    if (!overlap.empty()) {
      exact = append(both, overlap) && exact;
    }
    (a.at[i].end < b.at[j].end ? i : j)++;
  }
  return exact;
}

bool unite(const Spans& a, const Spans& b, Spans& either) {
  either.size = 0;
  bool exact = true;
  for (int32_t i = 0, j = 0; i < a.size || j < b.size;) {
    const bool from_a = j == b.size || (i < a.size && a.at[i].begin <= b.at[j].begin);
    const Interval next = from_a ? a.at[i++] : b.at[j++];
    if (either.size > 0 && next.begin <= either.at[either.size - 1].end) {
      Interval& last = either.at[either.size - 1];
      last.end = next.end > last.end ? next.end : last.end;
    } else {
      exact = append(either, next) && exact;
    }
  }
  return exact;
}

/// One row's question: columns stand at `shift + column`.
struct Row {
  const Rule& rule;
  const Query& query;
  int64_t shift;

  RowSpans leaf(int32_t index, Interval context) const;
  RowSpans subtree(int32_t last, Interval context) const;
};

RowSpans unresolved(int32_t index, Interval context) {
  return {spans_of(context), uint32_t{1} << index};
}

/// A leaf's spans within the columns of `context`, which is not empty.
RowSpans Row::leaf(int32_t index, Interval context) const {
  const Rule::Node& node = rule.nodes[index];
  // Within the context the leaf sees keys at `to_leaf + column`, if all steps are so kind.
  int64_t q = query.position;
  int64_t to_leaf = shift;
  for (int32_t i = node.step_begin; i < node.step_end; ++i) {
    const Rule::Step& step = rule.steps[i];
    if (!step.table.exists()) {
      q += step.q_add;
      to_leaf += step.key_add;
      continue;
    }
    if (!step.table.holds(q)) {
      return {spans_of({0, 0}), 0};
    }
    const int64_t first = to_leaf + context.begin;
    if (step.table.runs.affine_end == nullptr || !step.table.holds(first) ||
        step.table.runs
                .affine_end[(step.table.batch_stride == 0 ? 0 : query.batch) * step.table.length +
                            first] < to_leaf + context.end) {
      return unresolved(index, context);
    }
    q = step.table.position_at(query.batch, q);
    to_leaf += step.table.position_at(query.batch, first) - first;
  }
  const auto columns = [&](Interval positions) -> RowSpans {
    return {spans_of(intersect(context, {positions.begin - to_leaf, positions.end - to_leaf})), 0};
  };
  switch (node.kind) {
    case Rule::Kind::kAll:
      return {spans_of(context), 0};
    case Rule::Kind::kCausal:
      return columns(Causal{}.span(q));
    case Rule::Kind::kSlidingWindow:
      return columns(node.sliding_window.span(q));
    case Rule::Kind::kChunk:
      return columns(node.chunk.span(query.batch, q));
    case Rule::Kind::kSameId: {
      const Table& ids = node.same_id.ids;
      if (!ids.holds(q) || (node.same_id.negative_is_none && ids.at(query.batch, q) < 0)) {
        return {spans_of({0, 0}), 0};
      }
      const int64_t row = ids.batch_stride == 0 ? 0 : query.batch;
      if (ids.runs.same_begin == nullptr || ids.runs.same_is_once[row] == 0 ||
          ids.at(query.batch, q) < 0) {
        RowSpans inside = columns({0, ids.length});
        inside.unresolved = uint32_t{1} << index;
        return inside;
      }
      const int64_t place = row * ids.length + q;
      return columns({ids.runs.same_begin[place], ids.runs.same_end[place]});
    }
    case Rule::Kind::kPadding: {
      RowSpans inside = node.padding.by_column ? RowSpans{spans_of(context), 0}
                                               : columns({0, node.padding.length});
      inside.unresolved = uint32_t{1} << index;
      return inside;
    }
    default:
      return {spans_of({0, 0}), 0};
  }
}

RowSpans Row::subtree(int32_t last, Interval context) const {
  if (context.empty()) {
    return {spans_of(context), 0};
  }
  const Rule::Node& node = rule.nodes[last];
  if (node.kind != Rule::Kind::kAnd && node.kind != Rule::Kind::kOr) {
    return leaf(last, context);
  }
  const int32_t right_last = last - 1;
  const int32_t left_last = rule.nodes[right_last].first - 1;
  const RowSpans left = subtree(left_last, context);
  RowSpans result{};
  if (node.kind == Rule::Kind::kAnd) {
    // The right side is only asked where the left allows something: within one document, say,
    // positions that begin anew with each document go up by one.
    const RowSpans right = subtree(right_last, hull(left.spans));
    const bool exact = intersect(left.spans, right.spans, result.spans);
    result.unresolved = exact ? left.unresolved | right.unresolved : uint32_t{1} << last;
  } else {
    const RowSpans right = subtree(right_last, context);
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
  if (kv_positions.listed) {
    return unresolved(leaf, context);
  }
  return Row{rule, query, kv_positions.at(query.batch, 0)}.leaf(leaf, context);
}

RowSpans row_spans(const Rule& rule, const Query& query, const Positions& kv_positions,
                   int64_t kv_length) {
  const int32_t last = rule.size - 1;
  const Interval all{0, kv_length};
  if (kv_positions.listed) {  // neighbours in memory need not be neighbours
    return unresolved(last, all);
  }
  return Row{rule, query, kv_positions.at(query.batch, 0)}.subtree(last, all);
}

}  // namespace attn_mask
