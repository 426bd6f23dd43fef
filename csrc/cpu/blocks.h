#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace attn_mask {

/// Blocks of a line, `begin <= block < end`. A line is a few of these, not a bit for each block: of
/// those a long mask has too many.
struct BlockSpan {
  int32_t begin;
  int32_t end;
};

/// Sorted, disjoint, not touching.
using Blocks = std::vector<BlockSpan>;

/// Appends what begins no sooner than the last.
inline void append(Blocks& blocks, int64_t begin, int64_t end) {
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
inline void normalize(Blocks& blocks) {
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

inline Part part_of(const Blocks& blocks) { return {blocks.data(), blocks.data() + blocks.size()}; }

/// Calls `visit(begin, end)` for the blocks of `a` that are not in `b`, ascending.
template <typename Visit>
inline void for_each_beyond(Part a, Part b, Visit visit) {
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
inline void for_each_within(const Blocks& blocks, int64_t begin, int64_t end, Visit visit) {
  const auto ends_after = [](int64_t position, BlockSpan span) { return position < span.end; };
  auto span = std::upper_bound(blocks.begin(), blocks.end(), begin, ends_after);
  for (; span != blocks.end() && span->begin < end; ++span) {
    visit(std::max<int64_t>(begin, span->begin), std::min<int64_t>(end, span->end));
  }
}

/// What the blocks of keys hold for one block of queries.
struct Line {
  Part partial;
  Part full;
};

}  // namespace attn_mask
