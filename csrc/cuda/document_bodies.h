#pragma once

// What the threads of the kernel that finds documents do; see bodies.h. One block has the tokens of
// all rows, a chunk at a time, and a warp 128 of a chunk: its lanes load their four all at once,
// and ballots make of them the bits of 32 tokens each.

#include "bits.h"
#include "cuda/grid.h"
#include "format/document_params.h"

namespace attn_mask {

inline constexpr int64_t kDocumentThreads = 1024;
// A lane reads what each warp has found.
static_assert(kDocumentThreads == kLanes * kLanes);

/// Tokens of a lane, kLanes apart.
inline constexpr int32_t kTokensOfLane = 4;
inline constexpr int64_t kTokensOfWarp = kTokensOfLane * kLanes;
inline constexpr int64_t kTokensOfChunk = kTokensOfLane * kDocumentThreads;

/// What a lane finds: bit i of `begins`: its token i begins a document.
struct LaneStarts {
  uint32_t begins;
  bool rise;  // no id is less than the one before
};

/// Token i of the lane is `first + i kLanes`.
ATTN_MASK_INLINE LaneStarts starts_body(const DocumentParams& params, int64_t first) {
  const Table& ids = params.ids;
  const auto total = static_cast<uint32_t>(params.total());
  const auto length = static_cast<uint32_t>(ids.length);
  return ids.numbers.visit([&](const auto* numbers) ATTN_MASK_INLINE_LAMBDA {
    int64_t values[kTokensOfLane];
    int64_t before[kTokensOfLane];
    LaneStarts found{0, true};
    for (int32_t i = 0; i < kTokensOfLane; ++i) {
      const auto token = static_cast<uint32_t>(first + i * kLanes);
      const uint32_t row = token / length;
      const uint32_t position = token - row * length;
      const bool follows = token < total && position > 0;
      const int64_t index = row * ids.batch_stride + position * ids.stride;
      values[i] = follows ? static_cast<int64_t>(numbers[index]) : 0;
      before[i] = follows ? static_cast<int64_t>(numbers[index - ids.stride]) : 0;
      found.begins |= (token < total && position == 0 ? 1U : 0U) << i;
    }
    for (int32_t i = 0; i < kTokensOfLane; ++i) {
      found.begins |= (values[i] != before[i] ? 1U : 0U) << i;
      found.rise = found.rise && values[i] >= before[i];
    }
    return found;
  });
}

/// Of tokens up to some place.
struct DocumentStarts {
  int32_t count;  // documents that begin
  int32_t last;   // where the last of them does; 0 where there is none

  /// Bit i of `word`: token `first + i` begins a document.
  ATTN_MASK_INLINE void add(uint32_t word, int64_t first) {
    count += static_cast<int32_t>(count_bits(word));
    last = word != 0 ? static_cast<int32_t>(first + last_bit(word)) : last;
  }
};

/// Writes the borders of the documents that begin at the lane's tokens. `words[i]`: at which tokens
/// of the warp from `first + i kLanes` on documents begin; `seen`: of all tokens before `first`.
/// Returns the length of the longest document that ends there.
ATTN_MASK_INLINE int32_t write_borders_body(const DocumentParams& params,
                                            const uint32_t (&words)[kTokensOfLane],
                                            DocumentStarts seen, int64_t first, int64_t lane) {
  int32_t longest = 0;
  for (int32_t i = 0; i < kTokensOfLane; ++i) {
    const int64_t of_word = first + i * kLanes;
    if ((words[i] >> lane & 1U) != 0) {
      const auto token = static_cast<int32_t>(of_word + lane);
      DocumentStarts before = seen;
      before.add(words[i] & static_cast<uint32_t>(low_bits(lane)), of_word);
      longest = token - before.last > longest ? token - before.last : longest;
      if (params.borders != nullptr && before.count <= params.max_documents) {
        params.borders[before.count] = token;
      }
    }
    seen.add(words[i], of_word);
  }
  return longest;
}

/// The borders after the last document, by all threads.
ATTN_MASK_INLINE void fill_borders_body(const DocumentParams& params, int64_t count,
                                        int64_t thread) {
  for (int64_t i = count + thread; params.borders != nullptr && i <= params.max_documents;
       i += kDocumentThreads) {
    params.borders[i] = static_cast<int32_t>(params.total());
  }
}

}  // namespace attn_mask
