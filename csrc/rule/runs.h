#pragma once

#include <cstdint>
#include <vector>

#include "rule/problem.h"

namespace attn_mask {

/// Finds the runs in the tables of a problem's rule on the host, O(batch_size x length) for each,
/// so that documents, blocks and packed positions have spans. Only in tables that are looked at,
/// and in none that is much larger than the mask. Owns what the rule then points to.
class PreparedRuns {
 public:
  explicit PreparedRuns(Problem& problem);

 private:
  struct Runs {
    std::vector<int64_t> starts;
    std::vector<int64_t> of_row;
    std::vector<int64_t> last;
    std::vector<uint8_t> is_once;
  };

  enum class Kind { kSame, kAffine };

  void prepare(Table& table, Kind kind, const Problem& problem, int64_t end);

  std::vector<Runs> runs_;
};

}  // namespace attn_mask
