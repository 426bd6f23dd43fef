#pragma once

#include <optional>
#include <vector>

#include "format/block_mask.h"
#include "ops/rule_question.h"

namespace attn_mask {

/// The arguments of the operators that summarize a mask in blocks.
struct BlockArguments : RuleArguments {
  const c10::SymInt& heads;
  const c10::SymInt& q_block_size;
  const c10::SymInt& kv_block_size;
  bool separate_full_blocks;
};

/// Arguments that have been checked.
struct BlockQuestion {
  at::Device device;
  DecodedQuestion decoded;
  c10::SymInt q_blocks;
  c10::SymInt kv_blocks;
};

BlockQuestion check_blocks(const char* op, const BlockArguments& arguments);

/// A task that has yet to be told where to write; of planes that are alike it has one.
BlockMaskTask block_mask_task(const BlockArguments& arguments, const BlockQuestion& question);

/// Runs the task on the device.
std::optional<LongestLines> write_block_mask(const char* op, const BlockArguments& arguments,
                                             const BlockQuestion& question, BlockMaskTask task);

}  // namespace attn_mask
