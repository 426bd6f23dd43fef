#include "cpu/block_lines.h"

#include <array>
#include <cstring>

#include "cpu/block_search.h"
#include "cpu/dispatch.h"
#include "rule/levels/hull.h"
#include "rule/levels/spans.h"

namespace attn_mask {
namespace {

/// The keys of a batch row that padding shows to all queries alike.
struct VisibleKeys {
  std::vector<Interval> runs;  // of keys, ascending
  Blocks some;                 // blocks in which it shows any
  Blocks all;                  // blocks in which it shows all

  VisibleKeys(const BlockMaskParams& params, int64_t batch, uint32_t nodes) {
    const Query query = params.query(batch * params.heads, 0);
    std::array<uint8_t, kColumnsAtOnce> shown;
    // Padding may be short beside the mask.
    const int64_t shift = params.kv_positions.at(batch, 0);
    const Interval positions = Hull(params.rule).known;
    const Interval known =
        intersect({positions.begin - shift, positions.end - shift}, {0, params.kv_length});
    for (int64_t begin = known.begin; begin < known.end; begin += kColumnsAtOnce) {
      const int64_t n = std::min(kColumnsAtOnce, known.end - begin);
      cpu_kernels().evaluate(params, query, nodes, {begin, begin + n}, shown.data());
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
      append(some, run.begin / params.kv_block, (run.end - 1) / params.kv_block + 1);
      append(all, (run.begin + params.kv_block - 1) / params.kv_block, run.end / params.kv_block);
    }
  }

  bool any_within(int64_t begin, int64_t end) const {
    const auto ends_after = [](int64_t position, Interval run) { return position < run.end; };
    const auto run = std::upper_bound(runs.begin(), runs.end(), begin, ends_after);
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
/// it leaves of a block is decided by the block's keys.
uint32_t nodes_of_keys(const BlockMaskParams& params) {
  uint32_t nodes = 0;
  for (int32_t i = 0; i < params.rule.size; ++i) {
    const Rule::Node& node = params.rule.nodes[i];
    if (node.kind == Rule::Kind::kPadding && node.conjunct && node.step_begin == node.step_end &&
        node.padding.is_of_keys()) {
      nodes |= uint32_t{1} << i;
    }
  }
  return params.kv_positions.listed ? 0 : nodes;
}

// With more of them a block search takes less time.
constexpr int64_t kMostSingleRows = 8;

/// Whether blocks have to be searched, as seen from a row in the middle.
bool needs_search(const BlockMaskParams& params, uint32_t of_keys) {
  const int64_t row = params.q_length / 2;
  const RowRun run = row_run(params.rule, params.query(0, row), params.q_positions,
                             params.kv_positions, params.kv_length, params.q_length - row);
  return (run.unresolved & ~of_keys) != 0 || (params.rule.numbers != nullptr && run.rows == 1);
}

/// Finds lines straight from the rule.
class LineFinder {
 public:
  LineFinder(const BlockMaskParams& params, uint32_t of_keys,
             const std::vector<VisibleKeys>& visible, const BlockBounds& bounds)
      : params_(params), of_keys_(of_keys), visible_(visible), search_(params, bounds) {}

  /// Valid until the next call.
  Line operator()(int64_t plane, int64_t block) {
    if (!find_by_rows(plane, block)) {
      search_(plane, block, some_, full_);
    }
    normalize(some_);
    if (!params_.separate_full) {
      return {part_of(some_), {}};
    }
    partial_.clear();
    for_each_beyond(part_of(some_), part_of(full_),
                    [&](int64_t begin, int64_t end) { append(partial_, begin, end); });
    return {part_of(partial_), part_of(full_)};
  }

 private:
  /// From runs of rows; false where spans do not resolve them or where many are but a row.
  bool find_by_rows(int64_t plane, int64_t block) {
    const Interval rows = params_.rows_of(block);
    const VisibleKeys* visible =
        visible_.empty() ? nullptr : &visible_[static_cast<size_t>(plane / params_.heads)];
    some_.clear();
    full_.clear();
    shared_.clear();
    if (rows.end - rows.begin == params_.q_block && params_.kv_length > 0) {
      shared_.push_back({0, params_.kv_length});
    }
    int64_t single = 0;
    for (int64_t row = rows.begin; row < rows.end;) {
      const RowRun run = row_run(params_.rule, params_.query(plane, row), params_.q_positions,
                                 params_.kv_positions, params_.kv_length, rows.end - row);
      single += run.rows == 1 ? 1 : 0;
      if ((run.unresolved & ~of_keys_) != 0 ||
          (params_.rule.numbers != nullptr && single > kMostSingleRows)) {
        return false;
      }
      add(run, visible);
      row += run.rows;
    }
    for (const Interval keys : shared_) {
      const int64_t begin = (keys.begin + params_.kv_block - 1) / params_.kv_block;
      const int64_t end = keys.end / params_.kv_block;
      if (visible == nullptr) {
        append(full_, begin, end);
      } else {
        for_each_within(visible->all, begin, end,
                        [&](int64_t first, int64_t last) { append(full_, first, last); });
      }
    }
    return true;
  }

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
    const int64_t size = params_.kv_block;
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

  const BlockMaskParams& params_;
  uint32_t of_keys_;
  const std::vector<VisibleKeys>& visible_;  // for each batch row; none: nothing is padding
  Blocks some_;                              // what any row sees, in any order
  Blocks full_;
  Blocks partial_;
  std::vector<Interval> shared_;  // keys that all rows so far see but for padding
  std::vector<Interval> both_;
  BlockSearch search_;
};

/// Reads lines from states.
class StateReader {
 public:
  explicit StateReader(const BlockMaskParams& params) : params_(params) {}

  Line operator()(int64_t plane, int64_t block) {
    const int64_t n = params_.kv_blocks();
    const BlockState* const states = params_.states + (plane * params_.q_blocks() + block) * n;
    partial_.clear();
    full_.clear();
    for (int64_t i = 0; i < n; ++i) {
      if (states[i] == BlockState::kFull && params_.separate_full) {
        append(full_, i, i + 1);
      } else if (states[i] != BlockState::kEmpty) {
        append(partial_, i, i + 1);
      }
    }
    return {part_of(partial_), part_of(full_)};
  }

 private:
  const BlockMaskParams& params_;
  Blocks partial_;
  Blocks full_;
};

std::vector<VisibleKeys> visible_keys(const BlockMaskParams& params, uint32_t of_keys) {
  std::vector<VisibleKeys> visible;
  for (int64_t batch = 0; of_keys != 0 && batch < params.batch_size; ++batch) {
    visible.emplace_back(params, batch, of_keys);
  }
  return visible;
}

}  // namespace

void for_each_line(const BlockMaskParams& params, const std::function<VisitLine()>& visitor) {
  const int64_t rows = params.q_blocks();
  // To find a line takes as long as writing a kilobyte or two.
  const int64_t stored = params.kv[0].indices == nullptr ? 0 : params.kv_width;
  const int64_t bytes_of_line = 2048 + 2 * stored * static_cast<int64_t>(sizeof(int32_t));
  const auto run = [&](int64_t bytes, auto make_reader) {
    parallel_for(params.planes() * rows, (bytes_of_line + bytes) / kBlockGrains,
                 [&](int64_t begin, int64_t end) {
                   auto reader = make_reader();
                   const VisitLine visit = visitor();
                   for (int64_t index = begin; index < end; ++index) {
                     visit(index, reader(index / rows, index % rows));
                   }
                 });
  };
  if (params.states != nullptr) {
    run(params.kv_blocks(), [&] { return StateReader(params); });
    return;
  }
  const uint32_t of_keys = nodes_of_keys(params);
  const std::vector<VisibleKeys> visible = visible_keys(params, of_keys);
  const BlockBounds bounds(params);
  // Of each block a few rows of it are evaluated, if any.
  run(needs_search(params, of_keys) ? 32 * params.kv_length : 0,
      [&] { return LineFinder(params, of_keys, visible, bounds); });
}

}  // namespace attn_mask
