#pragma once

#include <cstdint>
#include <vector>

#include "format/mask_task.h"

namespace attn_mask {

/// The prepare step on the host: finds the runs in the tables of a task's rule, O(batch_size x
/// length) for each, so that documents, blocks and packed positions have spans. Only where tables
/// are asked, and not for one that is much larger than the mask. Owns what the rule then points to.
class PreparedTables {
 public:
  explicit PreparedTables(MaskTask& task);

 private:
  struct Runs {
    std::vector<int64_t> same_begin;
    std::vector<int64_t> same_end;
    std::vector<int64_t> affine_end;
    std::vector<uint8_t> same_is_once;
  };

  void prepare(Table& table, const MaskTask& task, int64_t end);

  std::vector<Runs> runs_;
};

}  // namespace attn_mask
