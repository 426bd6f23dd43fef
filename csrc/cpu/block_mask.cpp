#include "cpu/block_mask.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <deque>
#include <mutex>
#include <numeric>
#include <vector>

#include "cpu/parallel.h"
#include "rule/hull.h"
#include "rule/spans.h"

namespace attn_mask {
namespace {

/// Blocks of a line, `begin <= block < end`. A line is a few of these, not a bit for each block: of
/// those a long mask has too many.
struct BlockSpan {
  int32_t begin;
  int32_t end;
};

/// Sorted, disjoint, not touching.
using Blocks = std::vector<BlockSpan>;

/// Appends what begins no sooner than the last.
void append(Blocks& blocks, int64_t begin, int64_t end) {
  if (begin >= end) {
    return;
  }
  if (!blocks.empty() && begin <= blocks.back().end) {
    blocks.back().end = std::max(blocks.back().end, static_cast<int32_t>(end));
  } else {
    blocks.push_back({static_cast<int32_t>(begin), static_cast<int32_t>(end)});
  }
}

/// Puts spans in any order into that of Blocks.
void normalize(Blocks& blocks) {
  const auto begins_sooner = [](BlockSpan a, BlockSpan b) { return a.begin < b.begin; };
  if (!std::is_sorted(blocks.begin(), blocks.end(), begins_sooner)) {
    std::sort(blocks.begin(), blocks.end(), begins_sooner);
  }
  size_t size = 0;
  for (const BlockSpan span : blocks) {
    if (size > 0 && span.begin <= blocks[size - 1].end) {
      blocks[size - 1].end = std::max(blocks[size - 1].end, span.end);
    } else {
      blocks[size++] = span;
    }
  }
  blocks.resize(size);
}

/// A few of the spans of a line.
struct Part {
  const BlockSpan* begin_;
  const BlockSpan* end_;

  const BlockSpan* begin() const { return begin_; }
  const BlockSpan* end() const { return end_; }
};

Part part_of(const Blocks& blocks) { return {blocks.data(), blocks.data() + blocks.size()}; }

/// Calls `visit(begin, end)` for the blocks of `a` that are not in `b`, ascending.
template <typename Visit>
void for_each_beyond(Part a, Part b, Visit visit) {
  const BlockSpan* other = b.begin();
  for (const BlockSpan span : a) {
    int32_t begin = span.begin;
    for (; other != b.end() && other->end <= begin; ++other) {
    }
    for (const BlockSpan* next = other; next != b.end() && next->begin < span.end; ++next) {
      if (begin < next->begin) {
        visit(begin, next->begin);
      }
      begin = std::max(begin, next->end);
    }
    if (begin < span.end) {
      visit(begin, span.end);
    }
  }
}

/// Calls `visit(begin, end)` for the blocks of `[begin, end)` that are in `blocks`, ascending.
template <typename Visit>
void for_each_within(const Blocks& blocks, int64_t begin, int64_t end, Visit visit) {
  const auto ends_behind = [](int64_t position, BlockSpan span) { return position < span.end; };
  auto span = std::upper_bound(blocks.begin(), blocks.end(), begin, ends_behind);
  for (; span != blocks.end() && span->begin < end; ++span) {
    visit(std::max<int64_t>(begin, span->begin), std::min<int64_t>(end, span->end));
  }
}

/// The keys of a batch row that padding shows to all queries alike.
struct VisibleKeys {
  std::vector<Interval> runs;  // of keys, ascending
  Blocks some;                 // blocks in which it shows any
  Blocks all;                  // blocks in which it shows all

  VisibleKeys(const BlockMaskTask& task, int64_t batch, uint32_t nodes) {
    const Query query = task.query(batch * task.heads, 0);
    std::array<uint8_t, kAnswers> shown;
    // Padding may be short beside the mask.
    const int64_t shift = task.kv_positions.at(batch, 0);
    const Interval positions = Hull(task.rule).known;
    const Interval known =
        intersect({positions.begin - shift, positions.end - shift}, {0, task.kv_length});
    for (int64_t begin = known.begin; begin < known.end; begin += kAnswers) {
      const int64_t n = std::min(kAnswers, known.end - begin);
      cpu_kernels().answer(task, query, nodes, {begin, begin + n}, shown.data());
      for (int64_t key = 0; key < n;) {
        const auto* const change = static_cast<const uint8_t*>(
            std::memchr(shown.data() + key, shown[static_cast<size_t>(key)] == 0 ? 1 : 0,
                        static_cast<size_t>(n - key)));
        const int64_t end = change == nullptr ? n : change - shown.data();
        if (shown[static_cast<size_t>(key)] != 0) {
          add({begin + key, begin + end});
        }
        key = end;
      }
    }
    for (const Interval run : runs) {
      append(some, run.begin / task.kv_block, (run.end - 1) / task.kv_block + 1);
      append(all, (run.begin + task.kv_block - 1) / task.kv_block, run.end / task.kv_block);
    }
  }

  bool any_within(int64_t begin, int64_t end) const {
    const auto ends_behind = [](int64_t position, Interval run) { return position < run.end; };
    const auto run = std::upper_bound(runs.begin(), runs.end(), begin, ends_behind);
    return run != runs.end() && run->begin < end;
  }

 private:
  void add(Interval run) {
    if (!runs.empty() && runs.back().end == run.begin) {
      runs.back().end = run.end;
    } else {
      runs.push_back(run);
    }
  }
};

/// Padding that is the same for all queries of a batch row, and that nothing is shown against: what
/// it leaves of a block can be told from the block's keys.
uint32_t nodes_of_keys(const BlockMaskTask& task) {
  uint32_t nodes = 0;
  for (int32_t i = 0; i < task.rule.size; ++i) {
    const Rule::Node& node = task.rule.nodes[i];
    if (node.kind == Rule::Kind::kPadding && node.conjunct && node.step_begin == node.step_end &&
        node.padding.is_of_keys()) {
      nodes |= uint32_t{1} << i;
    }
  }
  return task.kv_positions.listed ? 0 : nodes;
}

/// Whether some rows are not their spans, so that their keys are evaluated one by one.
bool needs_elements(const BlockMaskTask& task, uint32_t of_keys) {
  for (const int64_t row : {int64_t{0}, task.q_length / 2, task.q_length - 1}) {
    const RowSpans spans =
        row_spans(task.rule, task.query(0, row), task.kv_positions, task.kv_length);
    if ((spans.unresolved & ~of_keys) != 0) {
      return true;
    }
  }
  return false;
}

/// What the blocks of keys hold for one block of queries.
struct Line {
  Part partial;
  Part full;
};

/// Finds lines straight from the rule.
class LineFinder {
 public:
  LineFinder(const BlockMaskTask& task, uint32_t of_keys, const std::vector<VisibleKeys>& visible)
      : task_(task), of_keys_(of_keys), visible_(visible) {}

  /// Valid until the next call.
  Line operator()(int64_t plane, int64_t block) {
    const Interval rows = task_.rows_of(block);
    const int64_t n = rows.end - rows.begin;
    const VisibleKeys* visible =
        visible_.empty() ? nullptr : &visible_[static_cast<size_t>(plane / task_.heads)];
    some_.clear();
    full_.clear();
    partial_.clear();
    shared_.clear();
    if (n == task_.q_block && task_.kv_length > 0) {
      shared_.push_back({0, task_.kv_length});
    }
    int64_t asked = 0;
    for (int64_t row = rows.begin; row < rows.end;) {
      const Query query = task_.query(plane, row);
      const RowRun run = row_run(task_.rule, query, task_.q_positions, task_.kv_positions,
                                 task_.kv_length, rows.end - row);
      if ((run.unresolved & ~of_keys_) == 0) {
        add(run, visible);
      } else {
        ask(run, query, plane);
        asked += run.rows;
      }
      row += run.rows;
    }
    for (const Interval keys : shared_) {
      const int64_t begin = (keys.begin + task_.kv_block - 1) / task_.kv_block;
      const int64_t end = keys.end / task_.kv_block;
      if (visible == nullptr) {
        append(full_, begin, end);
      } else {
        for_each_within(visible->all, begin, end,
                        [&](int64_t first, int64_t last) { append(full_, first, last); });
      }
    }
    if (asked > 0) {
      take_counts(asked, n);
    }
    normalize(some_);
    if (!task_.separate_full) {
      return {part_of(some_), {}};
    }
    for_each_beyond(part_of(some_), part_of(full_),
                    [&](int64_t begin, int64_t end) { append(partial_, begin, end); });
    return {part_of(partial_), part_of(full_)};
  }

 private:
  /// Rows that look alike. As spans move by less than their width, the keys that any row sees lie
  /// between where its first and its last row's begin and end; and as the gaps between them do,
  /// too, each span has those that all rows see between where the last begins and the first ends.
  void add(const RowRun& run, const VisibleKeys* visible) {
    std::array<Interval, MovingSpans::kMax> shared;
    int32_t size = 0;
    for (int32_t i = 0; i < run.spans.size; ++i) {
      const MovingInterval& span = run.spans.at[i];
      add_some(span.begin.at, span.end.in_row(run.rows - 1),
               run.unresolved == 0 ? nullptr : visible);
      const Interval keys{span.begin.in_row(run.rows - 1), span.end.at};
      if (!keys.empty()) {
        shared[static_cast<size_t>(size++)] = keys;
      }
    }
    if (shared_.size() == 1 && size == 1) {  // most often
      shared_[0] = intersect(shared_[0], shared[0]);
      if (shared_[0].empty()) {
        shared_.clear();
      }
      return;
    }
    both_.clear();
    auto keys = shared_.begin();
    for (int32_t i = 0; i < size && keys != shared_.end();) {
      const Interval& other = shared[static_cast<size_t>(i)];
      const Interval common = intersect(*keys, other);
      if (!common.empty()) {
        both_.push_back(common);
      }
      if (keys->end < other.end) {
        ++keys;
      } else {
        ++i;
      }
    }
    std::swap(shared_, both_);
  }

  /// Keys that some row sees.
  void add_some(int64_t begin, int64_t end, const VisibleKeys* visible) {
    const int64_t size = task_.kv_block;
    const auto add = [&](int64_t first, int64_t last) {
      some_.push_back({static_cast<int32_t>(first), static_cast<int32_t>(last)});
    };
    if (visible == nullptr) {
      add(begin / size, (end - 1) / size + 1);
      return;
    }
    const int64_t first = (begin + size - 1) / size;  // of the whole blocks
    const int64_t last = end / size;
    if (first > last) {
      if (visible->any_within(begin, end)) {
        add(last, first);
      }
      return;
    }
    if (begin < first * size && visible->any_within(begin, first * size)) {
      add(first - 1, first);
    }
    for_each_within(visible->some, first, last, add);
    if (last * size < end && visible->any_within(last * size, end)) {
      add(last, last + 1);
    }
  }

  /// Counts the keys of each block that rows see, by asking about each.
  void ask(const RowRun& run, Query query, int64_t plane) {
    counts_.resize(static_cast<size_t>(task_.kv_blocks()));
    for (int64_t row = 0; row < run.rows; ++row) {
      const RowSpans spans = run.row(row);
      for (int32_t i = 0; i < spans.spans.size; ++i) {
        const Interval span = spans.spans.at[i];
        for (int64_t begin = span.begin; begin < span.end;) {
          const int64_t end = std::min(begin + kAnswers, span.end);
          cpu_kernels().answer(task_, query, spans.unresolved, {begin, end}, answers_.data());
          for (int64_t key = begin; key < end;) {
            const int64_t block = key / task_.kv_block;
            const int64_t last = std::min((block + 1) * task_.kv_block, end);
            const uint8_t* const answers = answers_.data();
            counts_[static_cast<size_t>(block)] +=
                std::accumulate(answers + (key - begin), answers + (last - begin), int64_t{0});
            key = last;
          }
          begin = end;
        }
      }
      query = task_.query(plane, std::min(query.row + 1, task_.q_length - 1));
    }
  }

  /// Puts what was counted in `asked` of a block's `rows` rows to what is known of the others.
  void take_counts(int64_t asked, int64_t rows) {
    seen_.clear();
    filled_.clear();
    counts_.resize(static_cast<size_t>(task_.kv_blocks()));
    for (int64_t block = 0; block < task_.kv_blocks(); ++block) {
      int64_t& count = counts_[static_cast<size_t>(block)];
      if (count > 0) {
        append(seen_, block, block + 1);
      }
      if (count == asked * task_.kv_block) {
        append(filled_, block, block + 1);
      }
      count = 0;
    }
    some_.insert(some_.end(), seen_.begin(), seen_.end());
    std::swap(full_, partial_);
    full_.clear();
    if (rows == task_.q_block) {
      for (const BlockSpan span : partial_) {
        for_each_within(filled_, span.begin, span.end,
                        [&](int64_t begin, int64_t end) { append(full_, begin, end); });
      }
    }
    partial_.clear();
  }

  const BlockMaskTask& task_;
  uint32_t of_keys_;
  const std::vector<VisibleKeys>& visible_;  // for each batch row; none: nothing is padding
  Blocks some_;                              // what any row sees, in any order
  Blocks full_;
  Blocks partial_;
  std::vector<Interval> shared_;  // keys that all rows so far see but for padding
  std::vector<Interval> both_;
  Blocks seen_;
  Blocks filled_;
  std::vector<int64_t> counts_;
  std::array<uint8_t, kAnswers> answers_;
};

/// Reads lines from states.
class StateReader {
 public:
  explicit StateReader(const BlockMaskTask& task) : task_(task) {}

  Line operator()(int64_t plane, int64_t block) {
    const int64_t n = task_.kv_blocks();
    const BlockState* const states = task_.states + (plane * task_.q_blocks() + block) * n;
    partial_.clear();
    full_.clear();
    for (int64_t i = 0; i < n; ++i) {
      if (states[i] == BlockState::kFull && task_.separate_full) {
        append(full_, i, i + 1);
      } else if (states[i] != BlockState::kEmpty) {
        append(partial_, i, i + 1);
      }
    }
    return {part_of(partial_), part_of(full_)};
  }

 private:
  const BlockMaskTask& task_;
  Blocks partial_;
  Blocks full_;
};

int32_t* fill_upwards(int32_t* out, const int32_t* end, int64_t first, int64_t last) {
  const int64_t n = std::min<int64_t>(last - first, end - out);
  for (int64_t i = 0; i < n; ++i) {
    out[i] = static_cast<int32_t>(first + i);
  }
  return out + std::max<int64_t>(n, 0);
}

/// Writes one line of `total` blocks; returns how many are listed.
int64_t write_line(const BlockLists& lists, int64_t line, Part blocks, int64_t total,
                   int64_t width) {
  int64_t count = 0;
  for (const BlockSpan span : blocks) {
    count += span.end - span.begin;
  }
  lists.num_blocks[line] = static_cast<int32_t>(count);
  if (lists.indices == nullptr) {
    return count;
  }
  int32_t* out = lists.indices + line * width;
  const int32_t* const end = out + width;
  for (const BlockSpan span : blocks) {
    out = fill_upwards(out, end, span.begin, span.end);
  }
  int64_t rest = 0;
  for (const BlockSpan span : blocks) {
    out = fill_upwards(out, end, rest, span.begin);
    rest = span.end;
  }
  fill_upwards(out, end, rest, total);
  return count;
}

/// Lines as they are found, kept until all are: where a thread's lie does not move.
struct FoundLines {
  struct Place {
    const Blocks* blocks;
    size_t begin;
    size_t middle;  // partial blocks before, full ones behind
    size_t end;
  };

  std::vector<Place> places;
  std::deque<Blocks> blocks;
  std::mutex mutex;

  Blocks& blocks_of_thread() {
    const std::lock_guard<std::mutex> lock(mutex);
    return blocks.emplace_back();
  }

  Line at(int64_t index) const {
    const Place& place = places[static_cast<size_t>(index)];
    const BlockSpan* const data = place.blocks->data();
    return {{data + place.begin, data + place.middle}, {data + place.middle, data + place.end}};
  }
};

void keep(FoundLines& lines, int64_t index, Blocks& blocks, const Line& line) {
  const size_t begin = blocks.size();
  blocks.insert(blocks.end(), line.partial.begin(), line.partial.end());
  const size_t middle = blocks.size();
  blocks.insert(blocks.end(), line.full.begin(), line.full.end());
  lines.places[static_cast<size_t>(index)] = {&blocks, begin, middle, blocks.size()};
}

void raise(std::atomic<int64_t>& most, int64_t count) {
  int64_t before = most.load(std::memory_order_relaxed);
  while (before < count && !most.compare_exchange_weak(before, count)) {
  }
}

/// Turns the lines of a plane around: the blocks of queries for each block of keys in `columns`. A
/// block is open from the line in which it appears to that in which it is gone, so that there is
/// something to do only where lines differ.
class Transposer {
 public:
  Transposer(const BlockMaskTask& task, const FoundLines& lines, int64_t plane, Interval columns)
      : task_(task),
        lines_(lines),
        plane_(plane),
        columns_(columns),
        opened_(static_cast<size_t>(columns.end - columns.begin)) {}

  /// Writes those of one kind; returns the most of any column.
  int64_t write(const BlockLists& lists, Part Line::* kind) {
    changes_.clear();
    before_.clear();
    const int64_t rows = task_.q_blocks();
    for (int64_t row = 0; row <= rows; ++row) {
      now_.clear();
      if (row < rows) {
        const Line line = lines_.at(plane_ * rows + row);
        for (const BlockSpan span : line.*kind) {
          append(now_, std::max<int64_t>(span.begin, columns_.begin),
                 std::min<int64_t>(span.end, columns_.end));
        }
      }
      for_each_beyond(part_of(before_), part_of(now_), [&](int32_t begin, int32_t end) {
        for (int32_t column = begin; column < end; ++column) {
          changes_.push_back({column, {opened(column), static_cast<int32_t>(row)}});
        }
      });
      for_each_beyond(part_of(now_), part_of(before_), [&](int32_t begin, int32_t end) {
        std::fill(&opened(begin), &opened(begin) + (end - begin), static_cast<int32_t>(row));
      });
      std::swap(before_, now_);
    }
    return write_changes(lists);
  }

 private:
  struct Change {
    int32_t column;
    BlockSpan rows;
  };

  int32_t& opened(int64_t column) { return opened_[static_cast<size_t>(column - columns_.begin)]; }

  int64_t write_changes(const BlockLists& lists) {
    // They are in order of their rows; now by column.
    ends_.assign(opened_.size() + 1, 0);
    const auto place = [&](int32_t column) { return static_cast<size_t>(column - columns_.begin); };
    for (const Change& change : changes_) {
      ++ends_[place(change.column) + 1];
    }
    std::partial_sum(ends_.begin(), ends_.end(), ends_.begin());
    by_column_.resize(changes_.size());
    for (const Change& change : changes_) {
      by_column_[ends_[place(change.column)]++] = change.rows;
    }
    int64_t most = 0;
    size_t begin = 0;
    const int64_t line = task_.stored(plane_) * task_.kv_blocks();
    for (int64_t column = columns_.begin; column < columns_.end; ++column) {
      const size_t end = ends_[static_cast<size_t>(column - columns_.begin)];
      const Part blocks{by_column_.data() + begin, by_column_.data() + end};
      most =
          std::max(most, write_line(lists, line + column, blocks, task_.q_blocks(), task_.q_width));
      begin = end;
    }
    return most;
  }

  const BlockMaskTask& task_;
  const FoundLines& lines_;
  int64_t plane_;
  Interval columns_;
  std::vector<int32_t> opened_;
  std::vector<Change> changes_;
  std::vector<size_t> ends_;
  std::vector<BlockSpan> by_column_;
  Blocks before_;
  Blocks now_;
};

std::vector<VisibleKeys> visible_keys(const BlockMaskTask& task, uint32_t of_keys) {
  std::vector<VisibleKeys> visible;
  for (int64_t batch = 0; of_keys != 0 && batch < task.batch_size; ++batch) {
    visible.emplace_back(task, batch, of_keys);
  }
  return visible;
}

// Most masks take less time than a thread that is busy elsewhere takes to come: there must be some
// milliseconds for it to do.
constexpr int64_t kGrains = 64;

/// Calls `visit(line's index, line)` for every line, among threads; `visits` makes a thread's.
template <typename Visits>
void for_each_line(const BlockMaskTask& task, const Visits& visits) {
  const int64_t rows = task.q_blocks();
  // To find a line takes as long as writing a kilobyte or two.
  const int64_t stored = task.kv[0].indices == nullptr ? 0 : task.kv_width;
  const int64_t bytes_of_line = 2048 + 2 * stored * static_cast<int64_t>(sizeof(int32_t));
  const auto run = [&](int64_t bytes, auto make_reader) {
    at::parallel_for(0, task.planes() * rows, grain_of((bytes_of_line + bytes) / kGrains),
                     [&](int64_t begin, int64_t end) {
                       auto reader = make_reader();
                       auto visit = visits();
                       for (int64_t index = begin; index < end; ++index) {
                         visit(index, reader(index / rows, index % rows));
                       }
                     });
  };
  if (task.states != nullptr) {
    run(task.kv_blocks(), [&] { return StateReader(task); });
    return;
  }
  const uint32_t of_keys = nodes_of_keys(task);
  const std::vector<VisibleKeys> visible = visible_keys(task, of_keys);
  const int64_t elements = needs_elements(task, of_keys) ? 4 * task.q_block * task.kv_length : 0;
  run(elements, [&] { return LineFinder(task, of_keys, visible); });
}

}  // namespace

void find_block_states_cpu(const BlockMaskTask& task) {
  BlockMaskTask from_rule = task;
  from_rule.states = nullptr;
  from_rule.separate_full = true;
  for_each_line(from_rule, [&] {
    return [&](int64_t index, const Line& line) {
      BlockState* const states = task.states + index * task.kv_blocks();
      std::fill(states, states + task.kv_blocks(), BlockState::kEmpty);
      for (const BlockSpan span : line.partial) {
        std::fill(states + span.begin, states + span.end, BlockState::kPartial);
      }
      for (const BlockSpan span : line.full) {
        std::fill(states + span.begin, states + span.end, BlockState::kFull);
      }
    };
  });
}

std::optional<LongestLines> write_block_mask_cpu(const BlockMaskTask& task) {
  const int64_t rows = task.q_blocks();
  const int64_t columns = task.kv_blocks();
  std::atomic<int64_t> most_kv{0};
  std::atomic<int64_t> most_q{0};
  FoundLines lines;
  lines.places.resize(static_cast<size_t>(task.planes() * rows));
  for_each_line(task, [&] {
    return [&, &blocks = lines.blocks_of_thread()](int64_t index, const Line& line) {
      const int64_t stored = task.stored(index / rows) * rows + index % rows;
      raise(most_kv, write_line(task.kv[0], stored, line.partial, columns, task.kv_width));
      if (task.separate_full) {
        raise(most_kv, write_line(task.kv[1], stored, line.full, columns, task.kv_width));
      }
      keep(lines, index, blocks, line);
    };
  });
  // A plane is cut into as many pieces as there are threads for it.
  const int64_t stored_width = task.q[0].indices == nullptr ? 0 : task.q_width;
  const int64_t bytes = columns * (stored_width + 16) * static_cast<int64_t>(sizeof(int32_t));
  const int64_t pieces =
      std::clamp<int64_t>(bytes / (kGrains * grain_of(1)), 1,
                          std::min<int64_t>(at::get_num_threads(), std::max<int64_t>(1, columns)));
  const int64_t width = (columns + pieces - 1) / pieces;
  at::parallel_for(0, task.planes() * pieces, grain_of(bytes / pieces / kGrains),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t piece = begin; piece < end; ++piece) {
                       const int64_t first = piece % pieces * width;
                       const Interval part = intersect({first, first + width}, {0, columns});
                       if (part.empty()) {
                         continue;
                       }
                       Transposer transposer(task, lines, piece / pieces, part);
                       raise(most_q, transposer.write(task.q[0], &Line::partial));
                       if (task.separate_full) {
                         raise(most_q, transposer.write(task.q[1], &Line::full));
                       }
                     }
                   });
  return LongestLines{most_kv.load(), most_q.load()};
}

}  // namespace attn_mask
