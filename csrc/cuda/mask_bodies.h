#pragma once

// What one thread does to write dense masks; see bodies.h. A warp takes a row, or a part of a row.
// Each lane works out the bits of its columns, then the warp stores packs of 16 bytes, one beside
// the other.

#include "cuda/bodies.h"
#include "format/mask_task.h"
#include "rule/divisor.h"
#include "rule/word.h"

namespace attn_mask {

/// All that the kernel is given.
struct MaskParams {
  MaskTask task;
  Divisor q_length;
  Divisor heads;
  bool by_words;     // each lane has 64 columns at a time; else those of one pack, key by key
  int64_t groups;    // of columns that a warp takes at once, in a row
  int64_t per_part;  // of these to one warp
  int32_t depth;     // of the rule
};

static_assert(sizeof(MaskParams) <= 4096, "kernel parameters");

inline constexpr int64_t kLanes = 32;

/// Columns of a lane at a time.
template <typename T>
ATTN_MASK_INLINE int64_t lane_width(bool by_words) {
  return by_words ? kWordSize : kPackSize<T>;
}

template <typename T>
inline MaskParams mask_params(const MaskTask& task) {
  constexpr int64_t kWarps = 8192;  // enough to fill any present GPU
  MaskParams params{
      task, Divisor(task.q_length), Divisor(task.heads), has_words(task.rule, task.kv_positions), 0,
      0,    depth_of(task.rule)};
  const int64_t group = kLanes * lane_width<T>(params.by_words);
  // Rows may begin at any element of a pack.
  params.groups = (task.kv_length + kPackSize<T> - 1 + group - 1) / group;
  const int64_t parts = kWarps / task.rows() + 1;
  params.per_part = (params.groups + parts - 1) / parts;
  return params;
}

/// `bits`, one for each element, as elements of all or no bits.
template <typename T>
ATTN_MASK_INLINE Pack spread(uint32_t bits) {
  if constexpr (sizeof(T) == 8) {
    return {{uint64_t{0} - (bits & 1U), uint64_t{0} - (bits >> 1 & 1U)}};
  } else {
    constexpr uint32_t kSize = 8 * sizeof(T);
    constexpr uint32_t kCount = 32 / kSize;  // elements in 32 bits
    // Each copy of the bits puts another one at the begin of an element.
    constexpr uint32_t kCopies = kCount == 4 ? 0x00204081U : kCount == 2 ? 0x00008001U : 1U;
    constexpr uint32_t kFirst = kCount == 4 ? 0x01010101U : kCount == 2 ? 0x00010001U : 1U;
    constexpr uint32_t kAll = kCount == 1 ? ~0U : (1U << (kSize % 32)) - 1;
    uint32_t words[4];
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t of_word = bits >> (i * kCount) & ((1U << kCount) - 1);
      words[i] = (of_word * kCopies & kFirst) * kAll;
    }
    return {{words[0] | static_cast<uint64_t>(words[1]) << 32,
             words[2] | static_cast<uint64_t>(words[3]) << 32}};
  }
}

/// One row, as one lane of its warp sees it.
template <typename T>
class RowWriter {
 public:
  static constexpr uint32_t kAllBits = (uint32_t{1} << kPackSize<T>)-1;

  ATTN_MASK_INLINE RowWriter(const MaskParams& params, int64_t row_index)
      : task_(params.task), visible_(static_cast<T>(params.task.format.attend)) {
    const int64_t plane = params.q_length.divide(row_index);
    const int64_t row = row_index - plane * task_.q_length;
    const int64_t batch = params.heads.divide(plane);
    query_ = {batch, plane - batch * task_.heads, row, task_.q_positions.at(batch, row)};
    out_ = static_cast<T*>(task_.out) + task_.out_offset(query_);
    before_ =
        task_.out_strides[3] == 1
            ? static_cast<int64_t>(reinterpret_cast<uintptr_t>(out_) % sizeof(Pack) / sizeof(T))
            : 0;
    width_ = lane_width<T>(params.by_words);
  }

  /// The lane's bits in a group of columns: bit 0 is the first column, which the row may not have.
  ATTN_MASK_INLINE uint64_t word(int64_t group, int64_t lane, const WordStack& stack) const {
    if (unmasked_) {
      return ~uint64_t{0};
    }
    const int64_t first = (group * kLanes + lane) * width_ - before_;
    const Interval columns = intersect({first, first + width_}, {0, task_.kv_length});
    if (columns.empty()) {
      return 0;
    }
    return row_word(task_.rule, query_, task_.kv_positions, columns, stack)
           << (columns.begin - first);
  }

  /// All columns are written as those of fully masked rows that are unmasked.
  ATTN_MASK_INLINE void unmask() {
    unmasked_ = true;
    visible_ = static_cast<T>(task_.unmasking.value);
  }

  /// Writes pack `index` of the row, of which `bits` says what is attended to.
  ATTN_MASK_INLINE void write_pack(int64_t index, uint32_t bits) const {
    const int64_t first = index * kPackSize<T> - before_;
    const int64_t stride = task_.out_strides[3];
    const Interval columns = intersect({first, first + kPackSize<T>}, {0, task_.kv_length});
    if (columns.end - columns.begin == kPackSize<T> && stride == 1) {
      *reinterpret_cast<Pack*>(out_ + first) = pack(first, bits);
      return;
    }
    ATTN_MASK_ONE_BY_ONE
    for (int64_t column = columns.begin; column < columns.end; ++column) {
      const bool attended = (bits >> (column - first) & 1U) != 0;
      out_[column * stride] = attended ? visible(column) : static_cast<T>(task_.format.masked);
    }
  }

  /// The lane's packs of a group, from the words of all lanes.
  ATTN_MASK_INLINE void write_packs(int64_t group, int64_t lane, const uint64_t* words) const {
    constexpr int64_t kPerLane = kWordSize / kPackSize<T>;
    for (int64_t i = 0; i < kPerLane; ++i) {
      const int64_t of_group = i * kLanes + lane;
      write_pack(group * kLanes * kPerLane + of_group, bits_at(words, of_group));
    }
  }

 private:
  static ATTN_MASK_INLINE uint32_t bits_at(const uint64_t* words, int64_t pack) {
    if constexpr (kPackSize<T> == 16) {
      return reinterpret_cast<const uint16_t*>(words)[pack];
    } else {
      constexpr int64_t kPacks = 8 / kPackSize<T>;  // in a byte
      const uint32_t byte = reinterpret_cast<const uint8_t*>(words)[pack / kPacks];
      return byte >> (pack % kPacks * kPackSize<T>)&kAllBits;
    }
  }

  ATTN_MASK_INLINE int64_t bias_offset(int64_t column) const {
    const int64_t* const strides = task_.bias.strides;
    return query_.batch * strides[0] + query_.head * strides[1] + query_.row * strides[2] +
           column * strides[3];
  }

  /// An element that is attended to.
  ATTN_MASK_INLINE T visible(int64_t column) const {
    return task_.bias.data == nullptr ? visible_
                                      : static_cast<const T*>(task_.bias.data)[bias_offset(column)];
  }

  ATTN_MASK_INLINE Pack visible_pack(int64_t first) const {
    if (task_.bias.data == nullptr) {
      return pack_of<T>(visible_);
    }
    const T* const bias = static_cast<const T*>(task_.bias.data) + bias_offset(first);
    if (task_.bias.strides[3] == 1 && reinterpret_cast<uintptr_t>(bias) % sizeof(Pack) == 0) {
      return *reinterpret_cast<const Pack*>(bias);
    }
    Pack result{{0, 0}};
    ATTN_MASK_ONE_BY_ONE
    for (int64_t i = 0; i < kPackSize<T>; ++i) {
      const int64_t bit = i * 8 * static_cast<int64_t>(sizeof(T));
      const uint64_t value = static_cast<uint64_t>(bias[i * task_.bias.strides[3]]) << (bit % 64);
      result.words[0] |= bit < 64 ? value : 0;
      result.words[1] |= bit < 64 ? 0 : value;
    }
    return result;
  }

  ATTN_MASK_INLINE Pack pack(int64_t first, uint32_t bits) const {
    bits &= kAllBits;
    const Pack masked = pack_of<T>(task_.format.masked);
    if (bits == 0) {
      return masked;
    }
    const Pack attended = visible_pack(first);
    if (bits == kAllBits) {
      return attended;
    }
    const Pack keep = spread<T>(bits);
    return {{(attended.words[0] & keep.words[0]) | (masked.words[0] & ~keep.words[0]),
             (attended.words[1] & keep.words[1]) | (masked.words[1] & ~keep.words[1])}};
  }

  const MaskTask& task_;
  Query query_;
  T* out_;
  int64_t before_;  // elements of the row's first pack that are not the row's
  int64_t width_;   // columns of a lane
  T visible_;
  bool unmasked_ = false;
};

}  // namespace attn_mask
