#pragma once

#include <cstdint>

#include "format/mask_params.h"
#include "format/strided_rows.h"

namespace attn_mask {

/// How a dense mask is cut up: each row into `per_row` tiles of `keys` keys (the last may be
/// short). Tile `t` belongs to batch row `t / (per_row * q_length)`; within it the tiles of one key
/// range follow each other down the rows, so that a thread translates a stretch of padding once.
struct Tiling {
  int64_t keys;
  int64_t per_row;
};

/// A tile is small enough to stay in the second-level cache and large enough to be written in long
/// runs: going to the next row every 16 KiB takes nearly twice as long.
inline constexpr int64_t kTileBytes = 64 * 1024;

/// How many columns of a row are evaluated at once.
inline constexpr int64_t kColumnsAtOnce = 4096;

/// One set per instruction set; each works on a range so that the caller decides about threads.
struct CpuKernels {
  /// Writes tiles `[begin, end)` of the mask.
  void (*write_tiles)(const MaskParams& params, const Tiling& tiling, int64_t begin, int64_t end);
  /// Writes 1 for each of rows `[begin, end)` (counted through batch, heads and queries) in which
  /// no key is visible, else 0.
  void (*find_masked_rows)(const Problem& problem, int64_t begin, int64_t end, uint8_t* rows);
  /// Copies rows `[begin, end)`, unmasking those that are masked throughout.
  void (*unmask_rows)(const UnmaskParams& params, int64_t begin, int64_t end);
  /// Whether `test` holds for elements `[begin, end)` of row `row`.
  bool (*all)(const StridedRows& rows, const KeyTest& test, int64_t row, int64_t begin,
              int64_t end);
  /// Writes the `and` of some nodes of the rule (bit i: node i) at some columns of one row, at
  /// most kColumnsAtOnce: a byte for each, 1 or 0.
  void (*evaluate)(const Problem& problem, const Query& query, uint32_t nodes, Interval columns,
                   uint8_t* out);
};

namespace isa_default {
extern const CpuKernels kKernels;
}
#if defined(ATTN_MASK_HAS_X86_KERNELS)
namespace isa_avx2 {
extern const CpuKernels kKernels;
}
namespace isa_avx512 {
extern const CpuKernels kKernels;
}
#endif

}  // namespace attn_mask
