#pragma once

#include <optional>
#include <vector>

#include "format/block_mask.h"
#include "ops/core/rule_problem.h"

namespace attn_mask {

/// The arguments of the operators that summarize a mask in blocks.
struct BlockArguments : RuleArguments {
  template <typename Given>
  explicit BlockArguments(const Given& given)
      : RuleArguments(given),
        heads(given.template get<"heads">()),
        q_block_size(given.template get<"q_block_size">()),
        kv_block_size(given.template get<"kv_block_size">()),
        separate_full_blocks(given.template get_or<"separate_full_blocks">(true)) {}

  /// Lists of partial and of full blocks, or of both in one.
  int64_t kinds() const { return separate_full_blocks ? 2 : 1; }

  c10::SymInt heads;
  c10::SymInt q_block_size;
  c10::SymInt kv_block_size;
  bool separate_full_blocks;
};

/// What is known once the arguments have been checked.
struct CheckedBlocks {
  at::Device device;
  Decoded decoded;
  c10::SymInt q_blocks;
  c10::SymInt kv_blocks;
};

/// Checks the arguments and sets all of `params` (but under Meta) except where to write; of planes
/// that are alike it has one.
CheckedBlocks check_blocks(const char* op, const BlockArguments& arguments,
                           BlockMaskParams& params);

/// Runs the params on the device; it points nowhere afterwards.
std::optional<LongestLines> write_block_mask(const char* op, const BlockArguments& arguments,
                                             const CheckedBlocks& checked, BlockMaskParams& params);

}  // namespace attn_mask
