#pragma once

#include "cpu/kernels.h"

namespace attn_mask::ATTN_MASK_ISA {

/// Row level: the values of nodes of a rule at some columns of one row, a byte for each: 1 or 0.
/// Loops over one leaf at a time vectorise; evaluating the whole tree for each key takes tens of
/// times as long.
class RowValues {
 public:
  /// Of the subtree that ends with node `last`; at most kColumnsAtOnce. Valid until the next call.
  const uint8_t* of_subtree(const Problem& problem, const Query& query, int32_t last,
                            Interval columns);

  /// Of all of some nodes (bit i: node i) together.
  void of_nodes(const Problem& problem, const Query& query, uint32_t nodes, Interval columns,
                uint8_t* out);

 private:
  // At most every other node of a rule waits for the next.
  alignas(64) uint8_t stack_[Rule::kMaxNodes / 2 + 1][kColumnsAtOnce];
};

}  // namespace attn_mask::ATTN_MASK_ISA
