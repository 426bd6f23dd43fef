#include "rule/levels/numbers.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <mutex>
#include <numeric>
#include <optional>
#include <vector>

#include "rule/levels/runs.h"
#include "rule/levels/word.h"

namespace attn_mask {

struct KeyNumbers::Entry {
  std::once_flag once;
  std::atomic<bool> is_done{false};  // call_once takes longer than what a row is to take
  bool exists = false;               // else numbers do not say to which columns a query attends
  std::vector<int32_t> of_columns;
  std::vector<int64_t> values;
  std::vector<int32_t> places;
  NumberRow row{};
};

namespace {

// No range contains it.
constexpr int64_t kNowhere = std::numeric_limits<int64_t>::max();

// Of a longer mask tables hold but a part, or numbers take too much memory.
constexpr int64_t kMostColumns = int64_t{1} << 24;

// How much memory a search of numbers in order may be saved for.
constexpr int64_t kPlacesPerColumn = 4;

// Before they are narrowed.
struct WideRange {
  int64_t first;
  int64_t last;
};

/// Where a leaf sees the columns of a batch row; kNowhere where its tables hold none.
std::vector<int64_t> seen_positions(const Problem& problem, const Rule::Node& leaf, int64_t batch) {
  std::vector<int64_t> seen(static_cast<size_t>(problem.kv_length));
  const Positions& positions = problem.kv_positions;
  if (positions.listed) {
    positions.numbers.visit([&](const auto* numbers) {
      const auto* next = numbers + batch * positions.batch_stride;
      for (int64_t& position : seen) {
        position = positions.offset + within_far(*next);
        next += positions.stride;
      }
    });
  } else {
    std::iota(seen.begin(), seen.end(), positions.at(batch, 0));
  }
  for (int32_t i = leaf.step_begin; i < leaf.step_end; ++i) {
    const Rule::Step& step = problem.rule.steps[i];
    const Table& table = step.table;
    if (!table.exists()) {
      for (int64_t& position : seen) {
        position = position == kNowhere ? kNowhere : position + step.key_add;
      }
      continue;
    }
    table.numbers.visit([&](const auto* numbers) {
      const auto* const of_batch = numbers + batch * table.batch_stride;
      for (int64_t& position : seen) {
        position = table.holds(position) ? within_far(of_batch[position * table.stride]) : kNowhere;
      }
    });
  }
  return seen;
}

// What a leaf makes of the positions that it sees; false where that says nothing.

template <typename Of>
bool number(const Of&, int64_t, std::vector<int64_t>&) {
  return true;
}

bool number(const SameId& leaf, int64_t batch, std::vector<int64_t>& seen) {
  const Table& ids = leaf.ids;
  bool is_known = true;
  ids.numbers.visit([&](const auto* numbers) {
    const auto* const of_batch = numbers + batch * ids.batch_stride;
    for (int64_t& position : seen) {
      if (!ids.holds(position)) {
        position = kNowhere;
        continue;
      }
      position = of_batch[position * ids.stride];
      is_known = is_known && position != kNowhere;
    }
  });
  return is_known;
}

bool number(const Padding& leaf, int64_t batch, std::vector<int64_t>& seen) {
  if (!leaf.is_of_keys()) {
    return false;
  }
  int64_t column = 0;
  for (int64_t& position : seen) {
    const bool is_visible =
        position != kNowhere && leaf.attends(Query{batch, 0, 0, 0}, Key{column, position});
    position = is_visible ? 0 : kNowhere;
    ++column;
  }
  return true;
}

// Which of those a query at a position that the leaf sees attends to.

template <typename Of>
std::optional<WideRange> range_of(const Of& leaf, const Query& query) {
  const LeafRow row = leaf.row(query);
  return row.exact ? std::optional(WideRange{row.keys.begin, row.keys.end - 1}) : std::nullopt;
}

std::optional<WideRange> range_of(const SameId& leaf, const Query& query) {
  if (!leaf.ids.holds(query.position)) {
    return WideRange{0, -1};
  }
  const int64_t id = leaf.ids.at(query.batch, query.position);
  return leaf.negative_is_none && id < 0 ? WideRange{0, -1} : WideRange{id, id};
}

std::optional<WideRange> range_of(const Padding&, const Query&) { return WideRange{0, 0}; }

/// Narrows the numbers to 32 bits: those that are too far from 0 by counting which there are.
void narrow(const std::vector<int64_t>& wide, std::vector<int32_t>& narrowed,
            std::vector<int64_t>& values) {
  int64_t least = 0;
  int64_t greatest = 0;
  for (const int64_t number : wide) {
    least = std::min(least, number);
    greatest = std::max(greatest, number == kNowhere ? 0 : number);
  }
  narrowed.resize(wide.size());
  if (std::numeric_limits<int32_t>::min() <= least && greatest < NumberRow::kNowhere) {
    std::transform(wide.begin(), wide.end(), narrowed.begin(), [](int64_t number) {
      return number == kNowhere ? NumberRow::kNowhere : static_cast<int32_t>(number);
    });
    return;
  }
  values = wide;
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
  std::transform(wide.begin(), wide.end(), narrowed.begin(), [&](int64_t number) {
    const auto at = std::lower_bound(values.begin(), values.end(), number);
    return number == kNowhere ? NumberRow::kNowhere : static_cast<int32_t>(at - values.begin());
  });
}

int32_t order_of(const int32_t* begin, const int32_t* end) {
  bool falls = false;
  bool rises = false;
  bool is_gone = false;
  for (const int32_t* next = begin; next + 1 < end; ++next) {
    falls |= next[1] < next[0];
    rises |= next[1] > next[0];
    is_gone |= next[1] == NumberRow::kNowhere;
  }
  return is_gone || (falls && rises) ? 0 : falls ? -1 : 1;
}

/// Which columns have numbers at all, and their order.
NumberRow describe(const std::vector<int32_t>& numbers, const std::vector<int64_t>& values) {
  const auto is_somewhere = [](int32_t number) { return number != NumberRow::kNowhere; };
  const auto begin = std::find_if(numbers.begin(), numbers.end(), is_somewhere);
  const auto end = std::find_if(numbers.rbegin(), numbers.rend(), is_somewhere).base();
  NumberRow row{};
  row.of_columns = numbers.data();
  row.values = values.empty() ? nullptr : values.data();
  row.values_size = static_cast<int64_t>(values.size());
  row.columns = {begin - numbers.begin(), std::max(begin, end) - numbers.begin()};
  row.order = order_of(row.of_columns + row.columns.begin, row.of_columns + row.columns.end);
  return row;
}

/// The places of all numbers between the least and the greatest, if there are not too many.
std::vector<int32_t> places_of(NumberRow& row) {
  std::vector<int32_t> places;
  const int64_t size = row.columns.end - row.columns.begin;
  if (row.order == 0 || size <= 0) {
    return places;
  }
  const int32_t* const numbers = row.of_columns + row.columns.begin;
  const auto [least, greatest] = std::minmax(numbers[0], numbers[size - 1]);
  const int64_t values = int64_t{greatest} - least + 2;
  if (values > kPlacesPerColumn * size) {
    return places;
  }
  row.least = least;
  row.greatest = greatest;
  places.resize(static_cast<size_t>(values));
  // A number has as many before it as are less, or, where numbers fall, as are not.
  const auto place = [&](int64_t less) {
    return static_cast<int32_t>(row.order > 0 ? less : size - less);
  };
  auto next = places.begin();
  for (int64_t less = 0; less < size; ++less) {
    const int64_t at = row.order > 0 ? less : size - 1 - less;
    const auto end = places.begin() + (int64_t{numbers[at]} - least + 1);
    for (; next < end; ++next) {
      *next = place(less);
    }
  }
  std::fill(next, places.end(), place(size));
  return places;
}

bool sees_the_same(const Rule::Node& a, const Rule::Node& b) {
  const auto is_of_positions = [](const Rule::Node& leaf) {
    return leaf.kind != Rule::Kind::kSameId && leaf.kind != Rule::Kind::kPadding;
  };
  return is_of_positions(a) && is_of_positions(b) && a.step_begin == b.step_begin &&
         a.step_end == b.step_end;
}

}  // namespace

Interval NumberRow::find(NumberRange range) const {
  const int64_t first = place_of(range.first);
  const int64_t last = place_of(int64_t{range.last} + 1);
  return {columns.begin + (order > 0 ? first : last), columns.begin + (order > 0 ? last : first)};
}

int64_t NumberRow::place_of(int64_t number) const {
  if (columns.empty()) {
    return 0;
  }
  if (places != nullptr) {
    return places[std::clamp(number, least, greatest + 1) - least];
  }
  const int32_t* const begin = of_columns + columns.begin;
  const int32_t* const end = of_columns + columns.end;
  return (order > 0
              ? std::lower_bound(begin, end, number)
              : std::lower_bound(begin, end, number, [](int64_t a, int64_t b) { return a >= b; })) -
         begin;
}

bool KeyNumbers::is_wanted(const Problem& problem) {
  bool has_table = problem.kv_positions.listed;
  bool has_padding = false;
  bool has_bits = false;
  bool has_or = false;
  for (int32_t i = 0; i < problem.rule.size; ++i) {
    const Rule::Node& node = problem.rule.nodes[i];
    const Rule::Kind kind = node.kind;
    has_table = has_table || kind == Rule::Kind::kSameId;
    has_padding = has_padding || kind == Rule::Kind::kPadding;
    has_bits = has_bits || (kind == Rule::Kind::kPadding && !node.padding.is_of_keys());
    has_or = has_or || kind == Rule::Kind::kOr;
  }
  for (int32_t i = 0; i < problem.rule.steps_size; ++i) {
    has_table = has_table || problem.rule.steps[i].table.exists();
  }
  return (has_table || has_bits || (has_padding && has_or)) && problem.kv_length <= kMostColumns &&
         is_worth_preparing(problem, problem.batch_size, problem.kv_length);
}

KeyNumbers::KeyNumbers(const Problem& problem)
    : problem_(problem),
      entries_(
          std::make_unique<Entry[]>(static_cast<size_t>(problem.rule.size * problem.batch_size))) {
  for (int32_t i = 0; i < problem.rule.size; ++i) {
    alike_[i] = i;
    for (int32_t other = 0; other < i && alike_[i] == i; ++other) {
      const Rule::Kind kind = problem.rule.nodes[other].kind;
      if (kind != Rule::Kind::kAnd && kind != Rule::Kind::kOr &&
          sees_the_same(problem.rule.nodes[i], problem.rule.nodes[other])) {
        alike_[i] = other;
      }
    }
  }
}

KeyNumbers::~KeyNumbers() = default;

const NumberRow* KeyNumbers::row(int32_t node, int64_t batch) const {
  const int32_t leaf = alike_[node];
  Entry& entry = entries_[static_cast<size_t>(leaf * problem_.batch_size + batch)];
  const auto work_out = [&] {
    const Rule::Node& of = problem_.rule.nodes[leaf];
    std::vector<int64_t> numbers = seen_positions(problem_, of, batch);
    entry.exists = visit_leaf(of, [&](const auto& it) { return number(it, batch, numbers); });
    if (entry.exists) {
      narrow(numbers, entry.of_columns, entry.values);
      entry.row = describe(entry.of_columns, entry.values);
      entry.places = places_of(entry.row);
      entry.row.places = entry.places.empty() ? nullptr : entry.places.data();
    }
    entry.is_done.store(true, std::memory_order_release);
  };
  if (!entry.is_done.load(std::memory_order_acquire)) {
    std::call_once(entry.once, work_out);
  }
  return entry.exists ? &entry.row : nullptr;
}

bool KeyNumbers::find_range(int32_t node, const NumberRow& row, const Query& query,
                            NumberRange& range) const {
  const Rule::Node& leaf = problem_.rule.nodes[node];
  Query seen = query;
  range = {0, -1};
  if (!find_query(problem_.rule, leaf, query.batch, seen.position)) {
    return true;
  }
  const auto wide = visit_leaf(leaf, [&](const auto& of) { return range_of(of, seen); });
  if (!wide) {
    return false;
  }
  int64_t first = wide->first;
  int64_t last = wide->last;
  if (row.values != nullptr) {
    const int64_t* const end = row.values + row.values_size;
    first = std::lower_bound(row.values, end, first) - row.values;
    last = std::upper_bound(row.values, end, last) - row.values - 1;
  }
  first = std::max<int64_t>(first, std::numeric_limits<int32_t>::min());
  last = std::min<int64_t>(last, NumberRow::kNowhere - 1);
  if (first <= last) {
    range = {static_cast<int32_t>(first), static_cast<int32_t>(last)};
  }
  return true;
}

}  // namespace attn_mask
