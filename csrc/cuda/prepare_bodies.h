#pragma once

// What the threads of the prepare step's kernel do; see bodies.h. A block of threads has a part of
// a row, a warp 256 positions of it: its lanes load their eight all at once, and ballots make of
// them the bits of 32 positions each.

#include "bits.h"
#include "cuda/grid.h"
#include "rule/levels/device_tables.h"

namespace attn_mask {

/// Positions of a lane, kLanes apart.
inline constexpr int32_t kPerLane = 8;
static_assert(TableJob::kPart == kThreadsPerBlock * kPerLane);

/// Bit i: key `first + i kLanes` of row `row` of a padding is visible.
ATTN_MASK_INLINE uint32_t visible_body(const TableJob& job, int64_t row, int64_t first) {
  const Padding& padding = job.padding;
  const int64_t offset = padding.row_offset({row, 0, 0, 0});
  return with_bits(padding.element_size, [&](auto of_size) ATTN_MASK_INLINE_LAMBDA {
    const auto* const mask = static_cast<const decltype(of_size)*>(padding.mask) + offset;
    decltype(of_size) values[kPerLane];
    for (int32_t i = 0; i < kPerLane; ++i) {
      const int64_t key = first + i * kLanes;
      values[i] = key < job.length ? mask[key * padding.key_stride] : decltype(of_size){0};
    }
    uint32_t visible = 0;
    for (int32_t i = 0; i < kPerLane; ++i) {
      const bool exists = first + i * kLanes < job.length;
      visible |= (exists && padding.visible(values[i]) ? 1U : 0U) << i;
    }
    return visible;
  });
}

/// Where runs begin in a part of a row.
struct Heads {
  static constexpr int64_t kSize = 32;  // positions to a word

  const uint32_t* words;  // [kPart / kSize]
  uint64_t filled;        // bit i: word i is not 0
  int64_t first;          // the part's first position

  ATTN_MASK_INLINE bool begins(int64_t position) const {
    const int64_t place = position - first;
    return (words[place / kSize] >> (place % kSize) & 1U) != 0;
  }

  /// The last of them that is not after `position`, or `none`.
  ATTN_MASK_INLINE int64_t last_up_to(int64_t position, int64_t none) const {
    const int64_t place = position - first;
    const int64_t word = place / kSize;
    const uint64_t own = words[word] & low_bits(place % kSize + 1);
    const uint64_t before = filled & low_bits(word);
    return own != 0      ? position_of(word, last_bit(own))
           : before != 0 ? last_of(last_bit(before))
                         : none;
  }

  /// The first of them after `position`, or `none`.
  ATTN_MASK_INLINE int64_t first_after(int64_t position, int64_t none) const {
    const int64_t place = position - first;
    const int64_t word = place / kSize;
    const uint64_t own = words[word] & ~low_bits(place % kSize + 1);
    const uint64_t after = filled & ~low_bits(word + 1);
    return own != 0     ? position_of(word, first_bit(own))
           : after != 0 ? first_of(first_bit(after))
                        : none;
  }

  ATTN_MASK_INLINE int64_t first_of(int64_t word) const {
    return position_of(word, first_bit(words[word]));
  }
  ATTN_MASK_INLINE int64_t last_of(int64_t word) const {
    return position_of(word, last_bit(words[word]));
  }

 private:
  ATTN_MASK_INLINE int64_t position_of(int64_t word, int64_t bit) const {
    return first + word * kSize + bit;
  }
};

/// What a part tells those around it: the first and the last head in it. They look it up where it
/// is there already, and read the part themselves where not: no block waits for another.
struct Edges {
  static constexpr uint64_t kTold = uint64_t{1} << 63;
  static constexpr uint64_t kNone = (uint64_t{1} << 31) - 1;  // instead of a position

  uint64_t bits;

  ATTN_MASK_INLINE static Edges of(const Heads& heads) {
    if (heads.filled == 0) {
      return {kTold | kNone << 31 | kNone};
    }
    const int64_t first = heads.first_of(first_bit(heads.filled));
    const int64_t last = heads.last_of(last_bit(heads.filled));
    return {kTold | static_cast<uint64_t>(last) << 31 | static_cast<uint64_t>(first)};
  }

  ATTN_MASK_INLINE bool told() const { return bits != 0; }
  ATTN_MASK_INLINE bool has_head() const { return told() && (bits & kNone) != kNone; }

  /// The head that comes first on the way from the part before (`step` 1) or the one after (-1).
  ATTN_MASK_INLINE int64_t head(int64_t step) const {
    return static_cast<int64_t>((step > 0 ? bits : bits >> 31) & kNone);
  }
};

/// The runs of one row of a table.
struct RowRuns {
  const TableJob& job;
  int64_t row;

  /// Bit i: a run begins at position `first + i kLanes`.
  ATTN_MASK_INLINE uint32_t heads_body(int64_t first) const {
    const Table& table = job.table;
    return table.numbers.visit([&](const auto* numbers) ATTN_MASK_INLINE_LAMBDA {
      const auto* const from = numbers + row * table.batch_stride;
      int64_t values[kPerLane];
      int64_t before[kPerLane];
      for (int32_t i = 0; i < kPerLane; ++i) {
        const int64_t position = first + i * kLanes;
        const bool exists = 0 < position && position < job.length;
        values[i] = exists ? static_cast<int64_t>(from[position * table.stride]) : 0;
        before[i] = exists ? static_cast<int64_t>(from[(position - 1) * table.stride]) : 0;
      }
      uint32_t heads = 0;
      for (int32_t i = 0; i < kPerLane; ++i) {
        const int64_t position = first + i * kLanes;
        const bool begins =
            position == 0 || (position < job.length && !goes_on(before[i], values[i]));
        heads |= (begins ? 1U : 0U) << i;
      }
      return heads;
    });
  }

  /// Writes the bounds of a thread's positions. `around`: where the run begins that reaches into
  /// the part, and where that ends which reaches out of it. What is returned counts: 0, 1 or, where
  /// more would be the same, 2 repeats.
  ATTN_MASK_INLINE int32_t write_body(const Heads& heads, Interval around, int64_t thread) const {
    int32_t repeats = 0;
    for (int32_t i = 0; i < kPerLane; ++i) {
      const int64_t position = heads.first + i * kThreadsPerBlock + thread;
      if (position >= job.length) {
        break;
      }
      int64_t begin = heads.last_up_to(position, around.begin);
      int64_t end = heads.first_after(position, around.end);
      if (job.negative_is_none && job.table.at(row, position) < 0) {
        begin = end = position;
      }
      job.begin[row * job.length + position] = static_cast<int32_t>(begin);
      job.end[row * job.length + position] = static_cast<int32_t>(end);
      if (job.kind == TableJob::Kind::kSame && heads.begins(position)) {
        repeats += repeats_at(heads, around, position);
      }
    }
    return repeats < 2 ? repeats : 2;
  }

 private:
  ATTN_MASK_INLINE bool goes_on(int64_t before, int64_t value) const {
    if (job.kind == TableJob::Kind::kAffine) {
      return within_far(value) == within_far(before) + 1;
    }
    return value == before || (job.negative_is_none && value < 0 && before < 0);
  }

  /// Whether the id of the run that begins at `position` may have been there before. Those of
  /// documents go up, but for one run of negative ones.
  ATTN_MASK_INLINE int32_t repeats_at(const Heads& heads, Interval around, int64_t position) const {
    const int64_t id = job.table.at(row, position);
    if (id < 0) {
      return job.negative_is_none ? 0 : 1;
    }
    int64_t before = position - 1;
    if (before >= 0 && job.table.at(row, before) < 0) {
      before = (before < heads.first ? around.begin : heads.last_up_to(before, around.begin)) - 1;
    }
    return before >= 0 && id <= job.table.at(row, before) ? 2 : 0;
  }
};

}  // namespace attn_mask
