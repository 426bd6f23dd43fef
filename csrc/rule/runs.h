#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "rule/numbers.h"
#include "rule/problem.h"

namespace attn_mask {

/// The first position after all at which a table is read by a leaf with the steps `[begin, end)`.
int64_t end_of_positions(const Problem& problem, int32_t begin, int32_t end);

/// Whether a table of `rows` rows is small enough beside the mask.
bool is_worth_preparing(const Problem& problem, int64_t rows, int64_t length);

/// The prepare step on the host: finds the runs in the tables of a problem's rule, O(batch_size x
/// length) for each, so that documents, blocks and packed positions have spans. Only where tables
/// are evaluated, and not for one that is much larger than the mask. For what is in no runs, the
/// numbers of keys. Owns what the rule then points to.
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
  std::optional<KeyNumbers> numbers_;
};

}  // namespace attn_mask
