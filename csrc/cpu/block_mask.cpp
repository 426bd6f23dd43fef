#include <atomic>
#include <deque>
#include <mutex>
#include <numeric>

#include "cpu/block_lines.h"
#include "cpu/dispatch.h"

namespace attn_mask {
namespace {

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
    size_t middle;  // partial blocks before, full ones from here on
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
  Transposer(const BlockMaskParams& params, const FoundLines& lines, int64_t plane,
             Interval columns)
      : params_(params),
        lines_(lines),
        plane_(plane),
        columns_(columns),
        opened_at_(static_cast<size_t>(columns.end - columns.begin)) {}

  /// Writes those of one kind; returns the most of any column.
  int64_t write(const BlockLists& lists, Part Line::* kind) {
    changes_.clear();
    before_.clear();
    const int64_t rows = params_.q_blocks();
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
          changes_.push_back({column, {opened_at(column), static_cast<int32_t>(row)}});
        }
      });
      for_each_beyond(part_of(now_), part_of(before_), [&](int32_t begin, int32_t end) {
        std::fill(&opened_at(begin), &opened_at(begin) + (end - begin), static_cast<int32_t>(row));
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

  int32_t& opened_at(int64_t column) {
    return opened_at_[static_cast<size_t>(column - columns_.begin)];
  }

  int64_t write_changes(const BlockLists& lists) {
    // They are in order of their rows; now by column.
    ends_.assign(opened_at_.size() + 1, 0);
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
    const int64_t line = params_.stored(plane_) * params_.kv_blocks();
    for (int64_t column = columns_.begin; column < columns_.end; ++column) {
      const size_t end = ends_[static_cast<size_t>(column - columns_.begin)];
      const Part blocks{by_column_.data() + begin, by_column_.data() + end};
      most = std::max(
          most, write_line(lists, line + column, blocks, params_.q_blocks(), params_.q_width));
      begin = end;
    }
    return most;
  }

  const BlockMaskParams& params_;
  const FoundLines& lines_;
  int64_t plane_;
  Interval columns_;
  std::vector<int32_t> opened_at_;
  std::vector<Change> changes_;
  std::vector<size_t> ends_;
  std::vector<BlockSpan> by_column_;
  Blocks before_;
  Blocks now_;
};

}  // namespace

void find_block_states_cpu(const BlockMaskParams& params) {
  BlockMaskParams from_rule = params;
  from_rule.states = nullptr;
  from_rule.separate_full = true;
  for_each_line(from_rule, [&] {
    return [&](int64_t index, const Line& line) {
      BlockState* const states = params.states + index * params.kv_blocks();
      std::fill(states, states + params.kv_blocks(), BlockState::kEmpty);
      for (const BlockSpan span : line.partial) {
        std::fill(states + span.begin, states + span.end, BlockState::kPartial);
      }
      for (const BlockSpan span : line.full) {
        std::fill(states + span.begin, states + span.end, BlockState::kFull);
      }
    };
  });
}

std::optional<LongestLines> write_block_mask_cpu(const BlockMaskParams& params) {
  const int64_t rows = params.q_blocks();
  const int64_t columns = params.kv_blocks();
  std::atomic<int64_t> most_kv{0};
  std::atomic<int64_t> most_q{0};
  FoundLines lines;
  lines.places.resize(static_cast<size_t>(params.planes() * rows));
  for_each_line(params, [&] {
    return [&, &blocks = lines.blocks_of_thread()](int64_t index, const Line& line) {
      const int64_t stored = params.stored(index / rows) * rows + index % rows;
      raise(most_kv, write_line(params.kv[0], stored, line.partial, columns, params.kv_width));
      if (params.separate_full) {
        raise(most_kv, write_line(params.kv[1], stored, line.full, columns, params.kv_width));
      }
      keep(lines, index, blocks, line);
    };
  });
  // A plane is cut into as many pieces as there are threads for it.
  const int64_t stored_width = params.q[0].indices == nullptr ? 0 : params.q_width;
  const int64_t bytes = columns * (stored_width + 16) * static_cast<int64_t>(sizeof(int32_t));
  const int64_t pieces =
      std::clamp<int64_t>(bytes / (kBlockGrains * kGrainBytes), 1,
                          std::min<int64_t>(threads(), std::max<int64_t>(1, columns)));
  const int64_t width = (columns + pieces - 1) / pieces;
  parallel_for(params.planes() * pieces, bytes / pieces / kBlockGrains,
               [&](int64_t begin, int64_t end) {
                 for (int64_t piece = begin; piece < end; ++piece) {
                   const int64_t first = piece % pieces * width;
                   const Interval part = intersect({first, first + width}, {0, columns});
                   if (part.empty()) {
                     continue;
                   }
                   Transposer transposer(params, lines, piece / pieces, part);
                   raise(most_q, transposer.write(params.q[0], &Line::partial));
                   if (params.separate_full) {
                     raise(most_q, transposer.write(params.q[1], &Line::full));
                   }
                 }
               });
  return LongestLines{most_kv.load(), most_q.load()};
}

}  // namespace attn_mask
