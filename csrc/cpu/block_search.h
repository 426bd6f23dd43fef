#pragma once

#include <array>
#include <memory>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/kernels.h"
#include "format/block_mask.h"
#include "rule/levels/numbers.h"

namespace attn_mask {

/// The least and the greatest number of the columns of each block of keys, and of 2, 4, 8 ... of
/// them together, for each leaf that has numbers. Worked out for a leaf and a batch row when they
/// are first used, by any thread.
class BlockBounds {
 public:
  explicit BlockBounds(const BlockMaskParams& params);
  ~BlockBounds();

  /// Bounds of `leaves` single blocks from entry `leaves` on; entry i is for what entries 2 i and
  /// 2 i + 1 are for, entry 1 for all. Null where leaf `node` has no numbers.
  const NumberRange* of(int32_t node, int64_t batch) const;

  /// A power of 2, no less than the blocks of keys.
  int64_t leaves() const { return leaves_; }

 private:
  struct Entry;

  const BlockMaskParams& params_;
  int64_t leaves_ = 1;
  std::unique_ptr<Entry[]> entries_;  // [size of the rule, batch_size]
};

/// Finds a line of blocks for any rule: from the bounds of their numbers where those tell whether
/// all elements attend or none, else by evaluating rows until some element attends and some does
/// not.
class BlockSearch {
 public:
  BlockSearch(const BlockMaskParams& params, const BlockBounds& bounds)
      : params_(params), bounds_(bounds) {}

  /// Fills both with what any row of a block of queries sees, in any order, and with the full
  /// blocks.
  void operator()(int64_t plane, int64_t block, Blocks& some, Blocks& full);

 private:
  /// What is known of a leaf for all rows of the block of queries.
  struct LeafRows {
    const NumberRange* bounds;  // null: nothing
    NumberRange any;            // no row attends to a number outside of it
    NumberRange all;            // all rows attend to these
  };

  Interval columns_of(int64_t plane, Interval rows) const;
  LeafRows leaf_rows(int32_t node, int64_t plane, Interval rows) const;
  BlockState state(int64_t entry) const;
  void visit(int64_t entry, int64_t begin, int64_t size, Blocks& some, Blocks& full);
  void evaluate(const Query& query, BlockSpan blocks);

  const BlockMaskParams& params_;
  const BlockBounds& bounds_;
  Interval columns_;  // the rows see none outside of them
  std::array<LeafRows, Rule::kMaxNodes> leaves_;
  int64_t complete_;  // so many blocks of keys may be full
  Blocks unknown_;    // after the bounds
  Blocks left_;       // of these, in which not both kinds of elements were seen yet
  Blocks next_;
  std::vector<uint8_t> seen_;  // of each block: kVisible, kHidden
  std::array<uint8_t, kColumnsAtOnce> values_;
};

}  // namespace attn_mask
