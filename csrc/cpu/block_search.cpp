#include "cpu/block_search.h"

#include <algorithm>
#include <cstring>
#include <mutex>

#include "cpu/dispatch.h"
#include "rule/levels/spans.h"

namespace attn_mask {
namespace {

constexpr uint8_t kVisible = 1;
constexpr uint8_t kHidden = 2;

NumberRange hull(NumberRange a, NumberRange b) {
  return {std::min(a.first, b.first), std::max(a.last, b.last)};
}

constexpr NumberRange kNoNumber{INT32_MAX, INT32_MIN};

/// Whether the first and the last of some rows tell where all see a leaf.
bool is_told_by_ends(const BlockMaskParams& params, const Rule::Node& leaf) {
  bool is_told = !params.q_positions.listed;
  for (int32_t i = leaf.step_begin; i < leaf.step_end; ++i) {
    is_told = is_told && !params.rule.steps[i].table.exists();
  }
  return is_told &&
         visit_leaf(leaf, [](const auto& of) { return std::decay_t<decltype(of)>::kIsBand; });
}

}  // namespace

struct BlockBounds::Entry {
  std::once_flag once;
  std::vector<NumberRange> bounds;
};

BlockBounds::BlockBounds(const BlockMaskParams& params)
    : params_(params),
      entries_(
          std::make_unique<Entry[]>(static_cast<size_t>(params.rule.size * params.batch_size))) {
  while (leaves_ < params.kv_blocks()) {
    leaves_ *= 2;
  }
}

BlockBounds::~BlockBounds() = default;

const NumberRange* BlockBounds::of(int32_t node, int64_t batch) const {
  const KeyNumbers* const numbers = params_.rule.numbers;
  const NumberRow* const row = numbers == nullptr ? nullptr : numbers->row(node, batch);
  if (row == nullptr) {
    return nullptr;
  }
  Entry& entry = entries_[static_cast<size_t>(numbers->alike(node) * params_.batch_size + batch)];
  std::call_once(entry.once, [&] {
    std::vector<NumberRange>& bounds = entry.bounds;
    bounds.assign(static_cast<size_t>(2 * leaves_), kNoNumber);
    for (int64_t block = 0; block < params_.kv_blocks(); ++block) {
      const Interval columns = params_.columns_of(block);
      NumberRange range = kNoNumber;
      for (int64_t column = columns.begin; column < columns.end; ++column) {
        range = hull(range, {row->of_columns[column], row->of_columns[column]});
      }
      bounds[static_cast<size_t>(leaves_ + block)] = range;
    }
    for (auto i = static_cast<size_t>(leaves_) - 1; i > 0; --i) {
      bounds[i] = hull(bounds[2 * i], bounds[2 * i + 1]);
    }
  });
  return entry.bounds.data();
}

/// Without numbers: those of spans, as tables may be short beside the mask.
Interval BlockSearch::columns_of(int64_t plane, Interval rows) const {
  if (params_.rule.numbers != nullptr) {
    return {0, params_.kv_length};
  }
  Interval columns{params_.kv_length, 0};
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const RowSpans found =
        row_spans(params_.rule, params_.query(plane, row), params_.kv_positions, params_.kv_length);
    if (found.spans.size > 0) {
      columns.begin = std::min(columns.begin, found.spans.at[0].begin);
      columns.end = std::max(columns.end, found.spans.at[found.spans.size - 1].end);
    }
  }
  return columns;
}

BlockSearch::LeafRows BlockSearch::leaf_rows(int32_t node, int64_t plane, Interval rows) const {
  LeafRows result{nullptr, kNoNumber, {INT32_MIN, INT32_MAX}};
  const int64_t batch = plane / params_.heads;
  const NumberRange* const bounds = bounds_.of(node, batch);
  if (bounds == nullptr) {
    return result;
  }
  const KeyNumbers& numbers = *params_.rule.numbers;
  const NumberRow& keys = *numbers.row(node, batch);
  const int64_t last = rows.end - 1;
  const bool is_told = is_told_by_ends(params_, params_.rule.nodes[node]) && last > rows.begin;
  int64_t step = is_told ? last - rows.begin : 1;
  for (int64_t row = rows.begin; row < rows.end; row += step) {
    NumberRange range{};
    if (!numbers.find_range(node, keys, params_.query(plane, row), range)) {
      return result;
    }
    if (range.empty() && step > 1) {
      // No key has a number that this row sees, which says nothing of rows between the ends.
      result = {nullptr, kNoNumber, {INT32_MIN, INT32_MAX}};
      step = 1;
      row = rows.begin - step;
      continue;
    }
    if (!range.empty()) {
      result.any = hull(result.any, range);
    }
    result.all = {std::max(result.all.first, range.first), std::min(result.all.last, range.last)};
  }
  result.bounds = bounds;
  return result;
}

/// What bounds tell of all blocks of an entry.
BlockState BlockSearch::state(int64_t entry) const {
  uint32_t any = 0;  // bits of values that wait for their `and` or `or`
  uint32_t all = 0;
  for (int32_t i = 0; i < params_.rule.size; ++i) {
    const Rule::Kind kind = params_.rule.nodes[i].kind;
    if (kind == Rule::Kind::kAnd) {
      any = (any >> 2 << 1) | (any & (any >> 1) & 1U);
      all = (all >> 2 << 1) | (all & (all >> 1) & 1U);
      continue;
    }
    if (kind == Rule::Kind::kOr) {
      any = (any >> 2 << 1) | ((any | (any >> 1)) & 1U);
      all = (all >> 2 << 1) | ((all | (all >> 1)) & 1U);
      continue;
    }
    const LeafRows& leaf = leaves_[static_cast<size_t>(i)];
    const NumberRange of = leaf.bounds == nullptr ? kNoNumber : leaf.bounds[entry];
    const bool meets = leaf.any.first <= of.last && of.first <= leaf.any.last;
    const bool holds = leaf.all.first <= of.first && of.last <= leaf.all.last;
    any = any << 1 | (leaf.bounds == nullptr || meets ? 1U : 0U);
    all = all << 1 | (leaf.bounds != nullptr && holds ? 1U : 0U);
  }
  return any == 0 ? BlockState::kEmpty : all != 0 ? BlockState::kFull : BlockState::kUnknown;
}

void BlockSearch::visit(int64_t entry, int64_t begin, int64_t size, Blocks& some, Blocks& full) {
  const int64_t end = std::min(begin + size, params_.kv_blocks());
  if (begin >= end || begin * params_.kv_block >= columns_.end ||
      params_.columns_of(end - 1).end <= columns_.begin) {
    return;
  }
  const BlockState of_all = state(entry);
  if (of_all == BlockState::kFull) {
    append(some, begin, end);
    append(full, begin, std::min(end, complete_));
  } else if (of_all == BlockState::kUnknown && size == 1) {
    append(unknown_, begin, end);
  } else if (of_all == BlockState::kUnknown) {
    visit(2 * entry, begin, size / 2, some, full);
    visit(2 * entry + 1, begin + size / 2, size / 2, some, full);
  }
}

/// Notes what a query sees in some blocks.
void BlockSearch::evaluate(const Query& query, BlockSpan blocks) {
  const int64_t size = params_.kv_block;
  const Interval all{blocks.begin * size, params_.columns_of(blocks.end - 1).end};
  const auto [first, end] = intersect(all, columns_);
  if (all.begin < first) {
    seen_[static_cast<size_t>(blocks.begin)] |= kHidden;
  }
  if (end < all.end) {
    seen_[static_cast<size_t>(blocks.end - 1)] |= kHidden;
  }
  for (int64_t begin = first; begin < end; begin += kColumnsAtOnce) {
    const int64_t last = std::min(begin + kColumnsAtOnce, end);
    cpu_kernels().evaluate(params_, query, uint32_t{1} << (params_.rule.size - 1), {begin, last},
                           values_.data());
    for (int64_t column = begin; column < last;) {
      const int64_t block = column / size;
      const int64_t next = std::min(params_.columns_of(block).end, last);
      const uint8_t* const values = values_.data() + (column - begin);
      const auto n = static_cast<size_t>(next - column);
      seen_[static_cast<size_t>(block)] |=
          static_cast<uint8_t>((std::memchr(values, 1, n) == nullptr ? 0 : kVisible) |
                               (std::memchr(values, 0, n) == nullptr ? 0 : kHidden));
      column = next;
    }
  }
}

void BlockSearch::operator()(int64_t plane, int64_t block, Blocks& some, Blocks& full) {
  const Interval rows = params_.rows_of(block);
  for (int32_t i = 0; i < params_.rule.size; ++i) {
    const Rule::Kind kind = params_.rule.nodes[i].kind;
    if (kind != Rule::Kind::kAnd && kind != Rule::Kind::kOr) {
      leaves_[static_cast<size_t>(i)] = leaf_rows(i, plane, rows);
    }
  }
  complete_ = rows.end - rows.begin == params_.q_block ? params_.kv_length / params_.kv_block : 0;
  columns_ = columns_of(plane, rows);
  some.clear();
  full.clear();
  unknown_.clear();
  visit(1, 0, bounds_.leaves(), some, full);
  left_ = unknown_;
  seen_.assign(unknown_.empty() ? 0 : static_cast<size_t>(params_.kv_blocks()), 0);
  for (int64_t row = rows.begin; row < rows.end && !left_.empty(); ++row) {
    const Query query = params_.query(plane, row);
    next_.clear();
    for (const BlockSpan blocks : left_) {
      evaluate(query, blocks);
      for (int32_t i = blocks.begin; i < blocks.end; ++i) {
        if (seen_[static_cast<size_t>(i)] != (kVisible | kHidden)) {
          append(next_, i, i + 1);
        }
      }
    }
    std::swap(left_, next_);
  }
  for (const BlockSpan blocks : unknown_) {
    for (int32_t i = blocks.begin; i < blocks.end; ++i) {
      const uint8_t seen = seen_[static_cast<size_t>(i)];
      if ((seen & kVisible) != 0) {
        some.push_back({i, i + 1});
      }
      if (seen == kVisible && i < complete_) {
        full.push_back({i, i + 1});
      }
    }
  }
  normalize(full);
}

}  // namespace attn_mask
