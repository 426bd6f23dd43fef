#include "rule/levels/runs.h"

#include <algorithm>
#include <cstddef>

namespace attn_mask {
namespace {

// Finding runs takes some twenty times as long as writing an element.
constexpr int64_t kElementsPerEntry = 8;

}  // namespace

Interval positions_read(const Problem& problem, int32_t begin, int32_t end) {
  constexpr Interval kAnywhere{0, kOpen};
  if (problem.q_positions.numbers.data != nullptr || problem.kv_positions.numbers.data != nullptr) {
    return kAnywhere;  // where those lie is data
  }
  int64_t first = problem.q_positions.offset;
  int64_t first_key = problem.kv_positions.offset;
  for (int32_t i = begin; i < end; ++i) {
    const Rule::Step& step = problem.rule.steps[i];
    if (step.table.exists()) {
      return kAnywhere;
    }
    first += step.q_add;
    first_key += step.key_add;
  }
  return {std::min(first, first_key),
          std::max(first + problem.q_length, first_key + problem.kv_length)};
}

bool is_worth_preparing(const Problem& problem, int64_t rows, int64_t length, int64_t work) {
  const auto elements = static_cast<double>(problem.rows()) *
                        static_cast<double>(problem.kv_length) / static_cast<double>(rows);
  return static_cast<double>(length) <= elements * static_cast<double>(work) / kElementsPerEntry;
}

namespace {

/// A run goes on while numbers are equal.
struct SameRuns {
  template <typename T>
  static bool goes_on(T before, T number) {
    return number == before;
  }
  template <typename T>
  static bool breaks_between(const T* numbers, int64_t stride, int64_t n) {
    uint64_t differences = 0;
    for (int64_t i = 0; i < n; ++i) {
      differences |= static_cast<uint64_t>(numbers[(i + 1) * stride]) ^
                     static_cast<uint64_t>(numbers[i * stride]);
    }
    return differences != 0;
  }
};

/// A run goes on while positions go up by 1.
struct AffineRuns {
  template <typename T>
  static bool goes_on(T before, T number) {
    return within_far(number) == within_far(before) + 1;
  }
  template <typename T>
  static bool breaks_between(const T* numbers, int64_t stride, int64_t n) {
    uint64_t differences = 0;
    for (int64_t i = 0; i < n; ++i) {
      differences |= (static_cast<uint64_t>(numbers[(i + 1) * stride]) -
                      static_cast<uint64_t>(numbers[i * stride])) ^
                     1U;
    }
    // Numbers that are too far away are one position.
    return differences != 0 || within_far(numbers[0]) != static_cast<int64_t>(numbers[0]) ||
           within_far(numbers[n * stride]) != static_cast<int64_t>(numbers[n * stride]);
  }
};

/// Most runs are long: pieces without a break, which are found many numbers at a time, are skipped.
template <typename Kind, typename T>
void find_runs(const T* numbers, int64_t stride, Interval read, std::vector<int64_t>& starts) {
  constexpr int64_t kPiece = 64;
  const int64_t length = read.end;
  for (int64_t i = read.begin + 1; i < length;) {
    const int64_t n = std::min(kPiece, length - i);
    const T* const before = numbers + (i - 1) * stride;
    // A stride that is known is what lets the loop become vector instructions.
    const bool breaks = stride == 1 ? Kind::breaks_between(before, int64_t{1}, n)
                                    : Kind::breaks_between(before, stride, n);
    for (int64_t end = i + n; i < end; ++i) {
      if (!breaks) {
        i = end;
        break;
      }
      if (!Kind::goes_on(numbers[(i - 1) * stride], numbers[i * stride])) {
        starts.push_back(i);
      }
    }
  }
}

/// Appends where the runs of a row begin, as far as it is read.
template <typename Kind>
void find_runs(const Table& table, int64_t row, Interval read, std::vector<int64_t>& starts) {
  starts.push_back(read.begin);
  table.numbers.visit([&](const auto* numbers) {
    find_runs<Kind>(numbers + row * table.batch_stride, table.stride, read, starts);
  });
}

/// Whether no id >= 0 begins two of the runs at `starts`.
bool is_once(const Table& table, int64_t row, const int64_t* starts, const int64_t* end) {
  std::vector<int64_t> ids;
  for (; table.length > 0 && starts < end; ++starts) {
    const int64_t id = table.at(row, *starts);
    if (id >= 0) {
      ids.push_back(id);
    }
  }
  if (std::is_sorted(ids.begin(), ids.end())) {  // most are counted up
    return std::adjacent_find(ids.begin(), ids.end()) == ids.end();
  }
  const auto [least, greatest] = std::minmax_element(ids.begin(), ids.end());
  if (*greatest - *least < static_cast<int64_t>(ids.size()) - 1) {
    return false;  // more than there are numbers
  }
  std::sort(ids.begin(), ids.end());
  return std::adjacent_find(ids.begin(), ids.end()) == ids.end();
}

}  // namespace

PreparedRuns::PreparedRuns(Problem& problem, int64_t work) {
  Rule& rule = problem.rule;
  for (int32_t i = 0; i < rule.size; ++i) {
    Rule::Node& node = rule.nodes[i];
    if (node.kind == Rule::Kind::kSameId) {
      prepare(node.same_id.ids, Kind::kSame, problem,
              positions_read(problem, node.step_begin, node.step_end), work);
    }
  }
  for (int32_t i = 0; i < rule.steps_size; ++i) {
    if (rule.steps[i].table.exists()) {
      prepare(rule.steps[i].table, Kind::kAffine, problem, {0, kOpen}, work);
    }
  }
  if (KeyNumbers::is_wanted(problem)) {
    rule.numbers = &numbers_.emplace(problem);
  }
}

void PreparedRuns::prepare(Table& table, Kind kind, const Problem& problem, Interval read,
                           int64_t work) {
  const int64_t rows = table.batch_stride == 0 ? 1 : problem.batch_size;
  table.length = std::clamp<int64_t>(read.end, 0, table.length);
  read = {std::clamp<int64_t>(read.begin, 0, std::max<int64_t>(table.length - 1, 0)), table.length};
  if (!is_worth_preparing(problem, rows, read.end - read.begin, work)) {
    return;
  }
  Runs runs;
  runs.is_once.assign(static_cast<std::size_t>(rows), 1);
  for (int64_t row = 0; row < rows; ++row) {
    const auto first = runs.starts.size();
    runs.of_row.push_back(static_cast<int64_t>(first));
    if (kind == Kind::kSame) {
      find_runs<SameRuns>(table, row, read, runs.starts);
      const int64_t* const starts = runs.starts.data();
      runs.is_once[static_cast<std::size_t>(row)] =
          is_once(table, row, starts + first, starts + runs.starts.size()) ? 1 : 0;
    } else {
      find_runs<AffineRuns>(table, row, read, runs.starts);
    }
    runs.last.push_back(static_cast<int64_t>(runs.starts.size()) - 1);
    runs.starts.push_back(table.length);
  }
  table.runs = {runs.starts.data(), runs.of_row.data(), runs.last.data(), {runs.is_once.data()}};
  runs_.push_back(std::move(runs));
}

}  // namespace attn_mask
