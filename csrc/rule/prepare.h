#pragma once

#include <cstdint>
#include <vector>

#include "rule/rule.h"

namespace attn_mask {

/// The prepare step on the host: finds the runs in a rule's tables, O(batch_size x length) for
/// each, so that documents, blocks and packed positions have spans. Owns what the rule then points
/// to.
class PreparedTables {
 public:
  PreparedTables(Rule& rule, int64_t batch_size);

 private:
  struct Runs {
    std::vector<int64_t> same_begin;
    std::vector<int64_t> same_end;
    std::vector<int64_t> affine_end;
    std::vector<uint8_t> same_is_once;
  };

  void prepare(Table& table, int64_t batch_size);

  std::vector<Runs> runs_;
};

}  // namespace attn_mask
