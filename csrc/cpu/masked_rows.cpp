#include "cpu/isa.h"
#include "cpu/row_spans.h"
#include "cpu/row_values.h"

namespace attn_mask::ATTN_MASK_ISA {
namespace {

/// The first of `columns` to which all of some nodes (bit i: node i) let the query attend; else the
/// end of `columns`.
int64_t first_visible(const Problem& problem, const Query& query, uint32_t nodes, Interval columns,
                      RowValues& values) {
  // Most rows show a key soon.
  int64_t size = 64;
  for (int64_t begin = columns.begin; begin < columns.end; begin += size) {
    size = begin == columns.begin || size == kColumnsAtOnce ? size : 2 * size;
    const int64_t n = size < columns.end - begin ? size : columns.end - begin;
    uint8_t visible[kColumnsAtOnce];
    values.of_nodes(problem, query, nodes, {begin, begin + n}, visible);
    const auto* const found =
        static_cast<const uint8_t*>(__builtin_memchr(visible, 1, static_cast<std::size_t>(n)));
    if (found != nullptr) {
      return begin + (found - visible);
    }
  }
  return columns.end;
}

/// What rows before found of the keys of a batch row, where one padding leaf is the same for all
/// queries: with it, each key is read about once.
struct KnownKeys {
  int64_t batch = -1;
  int64_t visible = -1;      // one that is
  Interval hidden = {0, 0};  // none of these is
};

}  // namespace

void find_masked_rows(const Problem& problem, int64_t begin, int64_t end, uint8_t* rows) {
  const RowSpanFinder find_spans(problem);
  const bool is_alike = find_spans.is_simple() && find_spans.padding() != nullptr &&
                        find_spans.padding()->is_of_keys();
  RowValues values;
  KnownKeys known;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t plane = index / problem.q_length;
    const Query query = problem.query(plane, index - plane * problem.q_length);
    const RowSpans spans = find_spans(query);
    bool visible = spans.spans.size > 0 && spans.unresolved == 0;
    if (!is_alike) {
      for (int32_t i = 0; !visible && i < spans.spans.size; ++i) {
        const Interval columns = spans.spans.at[i];
        visible = first_visible(problem, query, spans.unresolved, columns, values) < columns.end;
      }
    } else if (!visible && spans.spans.size > 0) {
      const Interval columns = spans.spans.at[0];
      if (known.batch != query.batch) {
        known = {query.batch, -1, {0, 0}};
      }
      visible = columns.contains(known.visible);
      if (!visible) {
        const bool goes_on =
            known.hidden.begin <= columns.begin && columns.begin < known.hidden.end;
        const Interval rest{goes_on ? known.hidden.end : columns.begin, columns.end};
        const int64_t key = first_visible(problem, query, spans.unresolved, rest, values);
        visible = key < columns.end;
        known.visible = visible ? key : known.visible;
        known.hidden = {goes_on ? known.hidden.begin : columns.begin,
                        key > rest.begin ? key : rest.begin};
      }
    }
    rows[index] = visible ? 0 : 1;
  }
}

}  // namespace attn_mask::ATTN_MASK_ISA
