#pragma once

// What one thread does to write dense masks; see bodies.h. A warp takes a row, or a part of a row.
// Each lane works out the bits of its columns, then the warp stores packs of 16 bytes, one beside
// the other.

#include "cuda/bodies.h"
#include "format/mask_params.h"
#include "rule/levels/word.h"
#include "rule/math/divisor.h"

namespace attn_mask {

/// Columns of a lane at a time.
template <typename T>
ATTN_MASK_INLINE int64_t lane_width(bool by_words) {
  return by_words ? kWordSize : kPackSize<T>;
}

/// All that the kernel is given.
struct MaskLaunch {
  MaskParams params;
  Hull hull;
  int64_t rows;
  Divisor by_q_length;
  Divisor by_heads;
  int32_t groups;    // of columns that a warp takes at once, in a row
  int32_t per_part;  // of these to one warp
  WordPlan plan;
  bool by_words;  // each lane has 64 columns at a time; else those of one pack, key by key

  explicit MaskLaunch(const MaskParams& of)
      : params(of),
        hull(params.rule),
        rows(params.rows()),
        by_q_length(params.q_length),
        by_heads(params.heads),
        plan(params.rule, hull, params.kv_positions),
        by_words(has_words(params.rule, params.kv_positions)) {}
};

static_assert(sizeof(MaskLaunch) <= 4096, "kernel parameters");

template <typename T>
inline MaskLaunch mask_launch(const MaskParams& params) {
  constexpr int64_t kEnough = 8192;  // warps that fill any present GPU
  constexpr int64_t kSize = kPackSize<T>;
  MaskLaunch launch(params);
  const bool aligned = reinterpret_cast<uintptr_t>(params.out) % sizeof(Pack) == 0 &&
                       (params.batch_size == 1 || params.out_strides[0] % kSize == 0) &&
                       (params.heads == 1 || params.out_strides[1] % kSize == 0) &&
                       (params.q_length == 1 || params.out_strides[2] % kSize == 0);
  const int64_t group = kLanes * lane_width<T>(launch.by_words);
  const int64_t groups = (params.kv_length + (aligned ? 0 : kSize - 1) + group - 1) / group;
  const int64_t parts = kEnough / params.rows() + 1;
  launch.groups = static_cast<int32_t>(groups);
  launch.per_part = static_cast<int32_t>((groups + parts - 1) / parts);
  return launch;
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

  ATTN_MASK_INLINE RowWriter(const MaskLaunch& launch, int64_t row_index) : launch_(launch) {
    const MaskParams& params = launch.params;
    const int64_t plane = launch.by_q_length.divide(row_index);
    const int64_t row = row_index - plane * params.q_length;
    const int64_t batch = launch.by_heads.divide(plane);
    const Query query{batch, plane - batch * params.heads, row, params.q_positions.at(batch, row)};
    row_ = WordRow::of(params.rule, launch.hull, launch.plan, query, params.kv_positions);
    out_ = static_cast<T*>(params.out) + params.out_offset(query);
    before_ =
        params.out_strides[3] == 1
            ? static_cast<int32_t>(reinterpret_cast<uintptr_t>(out_) % sizeof(Pack) / sizeof(T))
            : 0;
    attend_ = repeat<T>(params.format.attend);
    masked_ = repeat<T>(params.format.masked);
  }

  /// What step `index` of the plan lets the row's query attend to, for one lane to work out.
  ATTN_MASK_INLINE Interval keys_body(int64_t index) const {
    return step_keys(launch_.params.rule, launch_.plan, row_.query, static_cast<int32_t>(index));
  }

  /// Which of the groups from `begin` to `end` is most likely to have a visible key: the one that
  /// has the last of those that may be.
  ATTN_MASK_INLINE int32_t likely_group(int32_t begin, int32_t end) const {
    const int64_t last = row_.keys.end - 1 - row_.first_key + before_;
    const int64_t group = last / (kLanes * kWordSize);
    return !launch_.by_words || last < 0 || group < begin ? begin
           : group < end                                  ? static_cast<int32_t>(group)
                                                          : end - 1;
  }

  /// The lane's bits in a group of columns: bit 0 is the first column, which the row may not have.
  /// `keys`: of each step of the plan.
  ATTN_MASK_INLINE uint64_t word(int64_t group, int64_t lane, const Interval* keys,
                                 const WordStack& stack) const {
    if (unmasked_) {
      return ~uint64_t{0};
    }
    const MaskParams& params = launch_.params;
    const int64_t width = lane_width<T>(launch_.by_words);
    const int64_t first = (group * kLanes + lane) * width - before_;
    const Interval columns = intersect({first, first + width}, {0, params.kv_length});
    if (columns.empty()) {
      return 0;
    }
    const uint64_t word =
        row_word(params.rule, launch_.plan, row_, params.kv_positions, columns, stack,
                 [&](int32_t step) ATTN_MASK_INLINE_LAMBDA { return keys[step]; });
    return word << (columns.begin - first);
  }

  /// All columns are written as those of fully masked rows that are unmasked.
  ATTN_MASK_INLINE void unmask() {
    unmasked_ = true;
    attend_ = repeat<T>(launch_.params.unmasking.value);
  }

  /// Writes pack `index` of the row, of which `bits` are the keys attended to.
  ATTN_MASK_INLINE void write_pack(int64_t index, uint32_t bits) const {
    const MaskParams& params = launch_.params;
    const int64_t first = index * kPackSize<T> - before_;
    const int64_t stride = params.out_strides[3];
    const Interval columns = intersect({first, first + kPackSize<T>}, {0, params.kv_length});
    if (columns.end - columns.begin == kPackSize<T> && stride == 1) {
      bits &= kAllBits;
      *reinterpret_cast<Pack*>(out_ + first) =
          bits == 0 ? Pack{{masked_, masked_}} : mix(visible_pack(first), bits);
      return;
    }
    ATTN_MASK_ONE_BY_ONE
    for (int64_t column = columns.begin; column < columns.end; ++column) {
      const bool attended = (bits >> (column - first) & 1U) != 0;
      out_[column * stride] = attended ? visible(column) : static_cast<T>(masked_);
    }
  }

  /// The lane's packs of a group, from the words of all lanes.
  ATTN_MASK_INLINE void write_packs(int64_t group, int64_t lane, const uint64_t* words) const {
    constexpr int64_t kPerLane = kWordSize / kPackSize<T>;
    const int64_t first = group * kLanes * kWordSize - before_;
    const MaskParams& params = launch_.params;
    const bool whole = first >= 0 && first + kLanes * kWordSize <= params.kv_length;
    if (whole && params.out_strides[3] == 1 && params.bias.data == nullptr) {
      Pack* const out = reinterpret_cast<Pack*>(out_ + first) + lane;
      ATTN_MASK_UNROLL
      for (int64_t i = 0; i < kPerLane; ++i) {
        out[i * kLanes] = mix({{attend_, attend_}}, bits_at(words, i * kLanes + lane));
      }
      return;
    }
    ATTN_MASK_ONE_BY_ONE
    for (int64_t i = lane; i < kLanes * kPerLane && first + i * kPackSize<T> < params.kv_length;
         i += kLanes) {
      write_pack(group * kLanes * kPerLane + i, bits_at(words, i));
    }
  }

 private:
  static ATTN_MASK_INLINE uint32_t bits_at(const uint64_t* words, int64_t pack) {
    const auto* const bytes = reinterpret_cast<const uint8_t*>(words);
    if constexpr (kPackSize<T> == 16) {
      return bytes[2 * pack] | static_cast<uint32_t>(bytes[2 * pack + 1]) << 8;
    } else {
      constexpr int64_t kPacks = 8 / kPackSize<T>;  // in a byte
      return bytes[pack / kPacks] >> (pack % kPacks * kPackSize<T>)&kAllBits;
    }
  }

  ATTN_MASK_INLINE const T* bias(int64_t column) const {
    const Bias& bias = launch_.params.bias;
    return static_cast<const T*>(bias.data) + row_.query.batch * bias.strides[0] +
           row_.query.head * bias.strides[1] + row_.query.row * bias.strides[2] +
           column * bias.strides[3];
  }

  /// An element that is attended to.
  ATTN_MASK_INLINE T visible(int64_t column) const {
    return launch_.params.bias.data == nullptr ? static_cast<T>(attend_) : *bias(column);
  }

  ATTN_MASK_INLINE Pack visible_pack(int64_t first) const {
    if (launch_.params.bias.data == nullptr) {
      return {{attend_, attend_}};
    }
    const T* const from = bias(first);
    const int64_t stride = launch_.params.bias.strides[3];
    if (stride == 1 && reinterpret_cast<uintptr_t>(from) % sizeof(Pack) == 0) {
      return *reinterpret_cast<const Pack*>(from);
    }
    Pack result{{0, 0}};
    ATTN_MASK_ONE_BY_ONE
    for (int64_t i = 0; i < kPackSize<T>; ++i) {
      const int64_t bit = i * 8 * static_cast<int64_t>(sizeof(T));
      const uint64_t value = static_cast<uint64_t>(from[i * stride]) << (bit % 64);
      result.words[0] |= bit < 64 ? value : 0;
      result.words[1] |= bit < 64 ? 0 : value;
    }
    return result;
  }

  /// The elements of `attended` where bits are 1, else masked ones.
  ATTN_MASK_INLINE Pack mix(const Pack& attended, uint32_t bits) const {
    if (bits == 0) {
      return {{masked_, masked_}};
    }
    if (bits == kAllBits) {
      return attended;
    }
    const Pack keep = spread<T>(bits);
    return {{(attended.words[0] & keep.words[0]) | (masked_ & ~keep.words[0]),
             (attended.words[1] & keep.words[1]) | (masked_ & ~keep.words[1])}};
  }

  const MaskLaunch& launch_;
  WordRow row_;
  T* out_;
  int32_t before_;   // elements of the row's first pack that are not the row's
  uint64_t attend_;  // elements that are attended to
  uint64_t masked_;
  bool unmasked_ = false;
};

}  // namespace attn_mask
