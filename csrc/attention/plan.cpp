#include "attention/plan.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "bits.h"
#include "cpu/dispatch.h"

namespace attn_mask::attention {
namespace {

// Measured with ATen's CPU kernels: a lower tile reads keys that are masked less often, but makes
// the kernel split queries more finely.
constexpr int64_t kTileRows = 256;

// The mask of a tile takes at most so many bytes, unless one of so few rows takes more.
constexpr int64_t kMaskBytes = int64_t{8} << 20;
constexpr int64_t kFewestRows = 16;  // others are a multiple of it

// A call of a kernel, with the views that it needs, takes as long as so many query-key pairs of a
// head of 64 channels.
constexpr int64_t kPairsPerCall = 8192;

// ATen's CPU kernels take so many keys at once, and all of them where is_causal needs one.
constexpr int64_t kKeysAtOnce = 512;

/// Keys that padding leaves to a batch row: all within `kept` where it is `exact`.
struct Padded {
  Interval kept;
  uint32_t exact;  // bit i: node i hides no key within
};

/// Rows of the mask in which spans move steadily.
struct Run {
  Interval rows;
  MovingSpans spans;
  bool by_data;

  bool operator==(const Run& other) const {
    const auto same = [](const MovingBorder& a, const MovingBorder& b) {
      return a.at == b.at && a.slope == b.slope;
    };
    if (rows.begin != other.rows.begin || rows.end != other.rows.end || by_data != other.by_data ||
        spans.size != other.spans.size) {
      return false;
    }
    for (int32_t i = 0; i < spans.size; ++i) {
      if (!same(spans.at[i].begin, other.spans.at[i].begin) ||
          !same(spans.at[i].end, other.spans.at[i].end)) {
        return false;
      }
    }
    return true;
  }

  Interval hull(Interval of) const {
    if (spans.size == 0) {
      return {0, 0};
    }
    const MovingBorder begin = spans.at[0].begin;
    const MovingBorder end = spans.at[spans.size - 1].end;
    return {begin.in_row(of.begin - rows.begin), end.in_row(of.end - 1 - rows.begin)};
  }
};

/// For leaves that hide keys from all queries of a batch row alike: where the visible ones lie.
Padded padded_keys(const Problem& problem, int64_t batch) {
  Padded padded{{0, problem.kv_length}, 0};
  std::vector<uint8_t> bytes;
  for (int32_t i = 0; i < problem.rule.size; ++i) {
    const Rule::Node& node = problem.rule.nodes[i];
    if (node.kind != Rule::Kind::kPadding || !node.conjunct || node.step_begin != node.step_end ||
        !node.padding.is_of_keys()) {
      continue;
    }
    const Query query = problem.query(batch * problem.heads, 0);
    bytes.resize(static_cast<size_t>(problem.kv_length));
    for (int64_t begin = 0; begin < problem.kv_length; begin += kColumnsAtOnce) {
      const int64_t end = std::min(begin + kColumnsAtOnce, problem.kv_length);
      cpu_kernels().evaluate(problem, query, uint32_t{1} << i, {begin, end}, &bytes[begin]);
    }
    const auto first = std::find(bytes.begin(), bytes.end(), 1);
    const auto last = std::find(bytes.rbegin(), bytes.rend(), 1).base();
    const Interval seen = first == bytes.end()
                              ? Interval{0, 0}
                              : Interval{first - bytes.begin(), last - bytes.begin()};
    if (first == bytes.end() || std::find(first, last, 0) == last) {
      padded.exact |= uint32_t{1} << i;
    }
    padded.kept = intersect(padded.kept, seen);
  }
  return padded;
}

/// Cuts the spans of a run to `kept`, and the run to the rows in which that is done alike.
void clip(RowRun& run, Interval kept) {
  const auto limit = [&](int64_t rows) { run.rows = std::min(run.rows, rows); };
  // How the border compares with a fixed one, in all rows that are left.
  const auto less = [&](MovingBorder border, int64_t fixed) {
    if (border.at < fixed && border.slope > 0) {
      limit(fixed - border.at);
    }
    return border.at < fixed;
  };
  MovingSpans clipped{};
  for (int32_t i = 0; i < run.spans.size; ++i) {
    MovingInterval span = run.spans.at[i];
    if (!less(span.begin, kept.end) || less(span.end, kept.begin + 1)) {
      continue;
    }
    if (less(span.begin, kept.begin)) {
      span.begin = {kept.begin, 0};
    }
    if (!less(span.end, kept.end)) {
      span.end = {kept.end, 0};
    }
    clipped.at[clipped.size++] = span;
  }
  run.spans = clipped;
}

/// Whether all keys of the first lie before those of the second. Then a tile of both would let what
/// one document's values hold reach another's queries: NaN times 0 is NaN.
bool are_apart(Interval first, Interval second) { return first.end <= second.begin; }

/// Gives the first row of a run to the one before where it is as if that went on: a border that
/// meets another is both in that row.
void join(std::vector<Run>& runs, Run next) {
  if (!runs.empty() && runs.back().by_data == next.by_data &&
      runs.back().spans.size == next.spans.size) {
    Run& before = runs.back();
    const int64_t rows = before.rows.end - before.rows.begin;
    const Interval last{before.rows.end - 1, before.rows.end};
    bool goes_on = !are_apart(before.hull(last), next.hull({next.rows.begin, next.rows.begin + 1}));
    bool is_same = true;
    for (int32_t i = 0; i < next.spans.size; ++i) {
      for (const auto border : {&MovingInterval::begin, &MovingInterval::end}) {
        const MovingBorder& a = before.spans.at[i].*border;
        const MovingBorder& b = next.spans.at[i].*border;
        goes_on = goes_on && a.in_row(rows) == b.at;
        is_same = is_same && a.slope == b.slope;
      }
    }
    if (goes_on) {
      const int64_t taken = is_same ? next.rows.end - next.rows.begin : 1;
      before.rows.end += taken;
      next.rows.begin += taken;
      for (int32_t i = 0; i < next.spans.size; ++i) {
        for (const auto border : {&MovingInterval::begin, &MovingInterval::end}) {
          MovingBorder& moved = next.spans.at[i].*border;
          moved.at += moved.slope * taken;
        }
      }
    }
  }
  if (next.rows.begin < next.rows.end) {
    runs.push_back(next);
  }
}

std::vector<Run> find_runs(const Problem& problem, int64_t batch) {
  const Padded padded = padded_keys(problem, batch);
  std::vector<Run> runs;
  for (int64_t row = 0; row < problem.q_length;) {
    const Query query{batch, 0, row, problem.q_positions.at(batch, row)};
    RowRun run = row_run(problem.rule, query, problem.q_positions, problem.kv_positions,
                         problem.kv_length, problem.q_length - row);
    clip(run, padded.kept);
    join(runs, {{row, row + run.rows}, run.spans, (run.unresolved & ~padded.exact) != 0});
    row += run.rows;
  }
  return runs;
}

class Cutter {
 public:
  Cutter(const Problem& problem, const Work& work)
      : work_(work),
        masks_(problem.batch_size * problem.heads),
        calls_pairs_(kPairsPerCall / std::max<int64_t>(1, problem.batch_size * work.heads)) {}

  std::vector<Segment> cut(const std::vector<Run>& runs) {
    for (const Run& run : runs) {
      cut(run);
    }
    halve_triangles();
    return std::move(segments_);
  }

  /// All keys for all queries.
  std::vector<Segment> cut_densely(const Problem& problem) {
    Run run{{0, problem.q_length}, {}, /*by_data=*/true};
    run.spans.at[0] = {{0, 0}, {problem.kv_length, 0}};
    run.spans.size = 1;
    cut(run);
    return std::move(segments_);
  }

 private:
  /// Tiles in one row of them may be so high.
  int64_t height(int64_t keys) const {
    const int64_t row_bytes = std::max<int64_t>(1, keys * work_.element_size * masks_);
    return std::clamp(kMaskBytes / row_bytes / kFewestRows * kFewestRows, kFewestRows, kTileRows);
  }

  void cut(const Run& run) {
    const Interval hull = run.hull(run.rows);
    const int64_t rows = run.rows.end - run.rows.begin;
    if (run.spans.size == 0) {
      add({Visible::kNothing, run.rows, {0, 0}});
      return;
    }
    const MovingInterval& span = run.spans.at[0];
    const bool is_one = run.spans.size == 1 && !run.by_data;
    const bool begin_moves = span.begin.slope != 0;
    const bool end_moves = span.end.slope != 0;
    if (is_one && ((!begin_moves && !end_moves) || rows == 1)) {
      add({Visible::kAll, run.rows, hull});
      return;
    }
    if (is_one && !begin_moves && end_moves && span.end.at == span.begin.at + 1) {
      add({Visible::kTriangle, run.rows, hull});
      return;
    }
    const bool is_alike = is_one && end_moves;
    const int64_t height = this->height(hull.end - hull.begin);
    for (int64_t row = run.rows.begin; row < run.rows.end;) {
      const Interval tile{row, std::min(row + height, run.rows.end)};
      Segment segment{Visible::kSome, tile, run.hull(tile)};
      segment.by_data = run.by_data;
      if (is_alike && tile.end - tile.begin == height) {
        segment.repeats = (run.rows.end - row) / height;
        segment.step = height;
        segment.grows = !begin_moves && segment.repeats > 1;
      }
      add(segment);
      row = segment.rows_of(segment.repeats - 1).end;
    }
  }

  /// Appends, or merges with what is there already where that is cheaper.
  void add(const Segment& segment) {
    if (!segments_.empty() && (extend(segments_.back(), segment) || merge(segment))) {
      return;
    }
    segments_.push_back(segment);
  }

  /// One more tile like those before it.
  static bool extend(Segment& before, const Segment& next) {
    const int64_t step = next.rows.begin - before.rows_of(before.repeats - 1).begin;
    const bool fits = next.repeats == 1 && !before.grows && before.visible == next.visible &&
                      next.visible != Visible::kSome && next.visible != Visible::kNothing &&
                      (before.repeats == 1 || step == before.step);
    if (!fits) {
      return false;
    }
    const Interval moved{before.keys_of(before.repeats - 1).begin + step,
                         before.keys_of(before.repeats - 1).end + step};
    const int64_t rows = before.rows.end - before.rows.begin;
    if (moved.begin != next.keys.begin || moved.end != next.keys.end ||
        rows != next.rows.end - next.rows.begin) {
      return false;
    }
    before.step = step;
    ++before.repeats;
    return true;
  }

  /// The upper half of a triangle needs half of the keys, of which the kernel would take all: it
  /// becomes a smaller triangle, and the lower half gets a mask.
  void halve_triangles() {
    const bool is_one_call = segments_.size() == 1 && segments_[0].repeats == 1;
    if (!work_.on_host || is_one_call) {
      return;
    }
    std::vector<Segment> halves;
    for (Segment segment : segments_) {
      const int64_t rows = segment.rows.end - segment.rows.begin;
      const int64_t upper = (rows / 2 + kFewestRows - 1) / kFewestRows * kFewestRows;
      if (segment.visible == Visible::kTriangle && rows > kTileRows && rows <= kKeysAtOnce &&
          rows - upper <= height(rows)) {
        Segment half = segment;
        half.rows.end = half.rows.begin + upper;
        half.keys.end = half.keys.begin + upper;
        halves.push_back(half);
        segment.visible = Visible::kSome;
        segment.rows.begin += upper;
      }
      halves.push_back(segment);
    }
    segments_ = std::move(halves);
  }

  int64_t pairs(const Segment& segment) const {
    const int64_t all =
        (segment.rows.end - segment.rows.begin) * (segment.keys.end - segment.keys.begin);
    return segment.visible == Visible::kTriangle ? all / 2 : all;
  }

  /// Small tiles that follow each other become one with a mask.
  bool merge(const Segment& next) {
    Segment& before = segments_.back();
    if (before.visible == Visible::kNothing && next.visible == Visible::kNothing) {
      before.rows.end = next.rows.end;
      return true;
    }
    if (before.visible == Visible::kNothing || next.visible == Visible::kNothing ||
        before.repeats > 1 || next.repeats > 1 ||
        (work_.on_host && are_apart(before.keys, next.keys))) {
      return false;
    }
    Segment both{
        Visible::kSome,
        {before.rows.begin, next.rows.end},
        {std::min(before.keys.begin, next.keys.begin), std::max(before.keys.end, next.keys.end)}};
    both.by_data = before.by_data || next.by_data;
    if (both.rows.end - both.rows.begin > height(both.keys.end - both.keys.begin) ||
        pairs(both) > pairs(before) + pairs(next) + calls_pairs_) {
      return false;
    }
    before = both;
    return true;
  }

  Work work_;
  int64_t masks_;
  int64_t calls_pairs_;
  std::vector<Segment> segments_;
};

}  // namespace

Plan make_plan(const Problem& problem, bool depends_on_batch, const Work& work) {
  Plan plan;
  std::vector<Run> before;
  const int64_t rows = depends_on_batch ? problem.batch_size : 1;
  for (int64_t batch = 0; batch < rows; ++batch) {
    std::vector<Run> runs = find_runs(problem, batch);
    if (batch > 0 && runs == before) {
      plan.back().batch.end = batch + 1;
      continue;
    }
    plan.push_back({{batch, batch + 1}, Cutter(problem, work).cut(runs)});
    before = std::move(runs);
  }
  if (!depends_on_batch) {
    plan.back().batch.end = problem.batch_size;
  }
  return plan;
}

Plan make_plan_without_data(const Problem& problem, const Work& work) {
  bool has_data =
      problem.q_positions.numbers.data != nullptr || problem.kv_positions.numbers.data != nullptr;
  for (int32_t i = 0; i < problem.rule.size; ++i) {
    has_data = has_data ||
               visit_leaf(problem.rule.nodes[i], [](const auto& leaf) { return leaf.has_table(); });
  }
  for (int32_t i = 0; i < problem.rule.steps_size; ++i) {
    has_data = has_data || problem.rule.steps[i].table.exists();
  }
  if (!has_data) {
    return make_plan(problem, /*depends_on_batch=*/false, work);
  }
  return {{{0, problem.batch_size}, Cutter(problem, work).cut_densely(problem)}};
}

bool write_tile(const Problem& problem, Interval batch, Interval rows, Interval keys,
                int32_t element_size, uint64_t masked, void* out, uint8_t* has_key) {
  const int64_t height = rows.end - rows.begin;
  const int64_t width = keys.end - keys.begin;
  const int64_t lines = (batch.end - batch.begin) * problem.heads * height;
  parallel_for(lines, width * element_size, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> bytes(static_cast<size_t>(std::min(width, kColumnsAtOnce)));
    for (int64_t line = begin; line < end; ++line) {
      const int64_t plane = batch.begin * problem.heads + line / height;
      const Query query = problem.query(plane, rows.begin + line % height);
      const RowSpans row = row_spans(problem.rule, query, problem.kv_positions, problem.kv_length);
      bool any = false;
      with_bits(element_size, [&](auto bits) {
        using Bits = decltype(bits);
        Bits* const to = static_cast<Bits*>(out) + line * width;
        std::fill(to, to + width, static_cast<Bits>(masked));
        for (int32_t i = 0; i < row.spans.size; ++i) {
          const Interval span = intersect(row.spans.at[i], keys);
          for (int64_t first = span.begin; first < span.end; first += kColumnsAtOnce) {
            const Interval part{first, std::min(first + kColumnsAtOnce, span.end)};
            Bits* const at = to + (part.begin - keys.begin);
            if (row.unresolved == 0) {
              std::fill(at, at + (part.end - part.begin), Bits{0});
              any = true;
              continue;
            }
            cpu_kernels().evaluate(problem, query, row.unresolved, part, bytes.data());
            for (int64_t k = 0; k < part.end - part.begin; ++k) {
              at[k] = bytes[static_cast<size_t>(k)] != 0 ? Bits{0} : static_cast<Bits>(masked);
              any = any || bytes[static_cast<size_t>(k)] != 0;
            }
          }
        }
      });
      has_key[line] = any ? 1 : 0;
    }
  });
  return std::find(has_key, has_key + lines, 0) == has_key + lines;
}

}  // namespace attn_mask::attention
