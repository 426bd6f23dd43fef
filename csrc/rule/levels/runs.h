#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "rule/levels/numbers.h"
#include "rule/problem.h"

namespace attn_mask {

/// The positions between which a table is read by a leaf with the steps `[begin, end)`.
Interval positions_read(const Problem& problem, int32_t begin, int32_t end);

/// Whether a table of `rows` rows is small enough beside the mask; an element of that is `work`
/// times as much work as to write it.
bool is_worth_preparing(const Problem& problem, int64_t rows, int64_t length, int64_t work = 1);

/// The prepare step on the host: finds the runs in the tables of a problem's rule, O(batch_size x
/// length) for each, so that documents, blocks and packed positions have spans. Only where tables
/// are evaluated, and not for one that is much larger than the mask (see is_worth_preparing). For
/// what is in no runs, the numbers of keys. Owns what the rule then points to.
class PreparedRuns {
 public:
  explicit PreparedRuns(Problem& problem, int64_t work = 1);

 private:
  struct Runs {
    std::vector<int64_t> starts;
    std::vector<int64_t> of_row;
    std::vector<int64_t> last;
    std::vector<uint8_t> is_once;
  };

  enum class Kind { kSame, kAffine };

  void prepare(Table& table, Kind kind, const Problem& problem, Interval read, int64_t work);

  std::vector<Runs> runs_;
  std::optional<KeyNumbers> numbers_;
};

}  // namespace attn_mask
