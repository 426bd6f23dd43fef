#pragma once

// How attention by a rule is cut into tiles that dense kernels can take: from the rule alone, on
// the host, in O(rows / tile) for rules that spans can say.

#include <cstdint>
#include <vector>

#include "rule/levels/spans.h"
#include "rule/problem.h"

namespace attn_mask::attention {

/// What the queries of a tile see of its keys.
enum class Visible : int64_t {
  kNothing,   // no query sees a key
  kAll,       // each sees all of them
  kTriangle,  // query i sees keys 0 to i
  kSome,      // needs a mask
};

/// Tiles that look alike. Tile i is `i * step` rows further down than the first, and as many keys
/// further to the right, or as many keys wider where it `grows`.
struct Segment {
  Visible visible;
  Interval rows;  // of the first tile
  Interval keys;
  int64_t repeats = 1;
  int64_t step = 0;
  bool grows = false;
  bool by_data = false;  // each batch row has a mask of its own, and each head that bits are for

  Interval rows_of(int64_t i) const { return {rows.begin + i * step, rows.end + i * step}; }
  Interval keys_of(int64_t i) const {
    return {keys.begin + (grows ? 0 : i * step), keys.end + i * step};
  }
};

/// The tiles of batch rows that look alike: each query is in one of them.
struct BatchPlan {
  Interval batch;
  std::vector<Segment> segments;
};

using Plan = std::vector<BatchPlan>;

/// What the work of a tile is counted in: query-key pairs of a head.
struct Work {
  int64_t heads;         // of the query
  int64_t element_size;  // of a mask, in bytes
  bool on_host;          // whether it is for ATen's CPU kernels
};

/// The plan of a problem that is not empty and whose tables have been prepared (PreparedRuns). Rows
/// of the batch are alike unless `depends_on_batch`.
Plan make_plan(const Problem& problem, bool depends_on_batch, const Work& work);

/// The plan of a problem of whose tables the host has none: dense tiles, or, where no leaf has a
/// table, the same as above.
Plan make_plan_without_data(const Problem& problem, const Work& work);

/// Writes the mask of a tile, [batch or 1, heads or 1, rows, keys] without gaps: 0 for visible
/// keys, -inf for the others, in elements of `element_size` bytes for which -inf has the bits
/// `masked`. `has_key`: for each row of the mask, whether any key is visible to it; returns whether
/// that is so for all.
bool write_tile(const Problem& problem, Interval batch, Interval rows, Interval keys,
                int32_t element_size, uint64_t masked, void* out, uint8_t* has_key);

}  // namespace attn_mask::attention
