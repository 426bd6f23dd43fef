#pragma once

#include <optional>

#include "format/block_mask.h"

namespace attn_mask {

/// Writes the states of all blocks to host memory, with torch's intra-op threads.
void find_block_states_cpu(const BlockMaskParams& params);

/// Writes the lists of a block mask to host memory, with torch's intra-op threads: by its states
/// where there are any, else straight from the rule, in O(rows + blocks) where rows have spans.
/// What it returns may be more than fits into the widths given.
std::optional<LongestLines> write_block_mask_cpu(const BlockMaskParams& params);

}  // namespace attn_mask
