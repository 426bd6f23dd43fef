#pragma once

#include <cstdint>
#include <memory>

#include "rule/problem.h"

namespace attn_mask {

/// Numbers from `first` to `last`.
struct NumberRange {
  int32_t first;
  int32_t last;

  ATTN_MASK_INLINE bool empty() const { return last < first; }
};

/// The columns of a batch row as a leaf sees them.
struct NumberRow {
  /// What a column has that no query attends to.
  static constexpr int32_t kNowhere = INT32_MAX;

  const int32_t* of_columns;  // [kv_length]
  const int64_t* values;      // sorted: what a number stands for; null: for itself
  int64_t values_size;
  Interval columns;  // all others have kNowhere
  int32_t order;     // within: 1 where numbers nowhere fall, -1 where they nowhere rise, else 0

  const int32_t* places;  // place_of() from `least` to `greatest + 1`; null: to be searched
  int64_t least;
  int64_t greatest;

  /// The columns with numbers within `range`, where there is an order.
  Interval find(NumberRange range) const;

 private:
  /// How many of `columns` come before those from `number` on: those that are less, or, where
  /// numbers fall, those that are not.
  int64_t place_of(int64_t number) const;
};

/// Number level, on the host: a number for each column such that a query attends to the columns
/// whose numbers lie within two that it has: positions of keys where a leaf sees an interval of
/// them, ids, or whether padding shows a key. Numbers that are in order make spans of what tables
/// (documents, other positions) do not hold in a few runs; any others are compared many at a time.
/// Worked out for a leaf and a batch row when they are first used, by any thread.
class KeyNumbers {
 public:
  explicit KeyNumbers(const Problem& problem);
  ~KeyNumbers();

  /// Whether that takes little time beside the mask, and a rule has leaves that may need it.
  static bool is_wanted(const Problem& problem);

  /// The first leaf whose rows are the same as those of leaf `node`.
  int32_t alike(int32_t node) const { return alike_[node]; }

  /// Null where leaf `node` has none.
  const NumberRow* row(int32_t node, int64_t batch) const;

  /// Finds the numbers that a query attends to under leaf `node`, whose row this is; false where
  /// numbers do not say it.
  bool find_range(int32_t node, const NumberRow& row, const Query& query, NumberRange& range) const;

 private:
  struct Entry;

  const Problem problem_;
  int32_t alike_[Rule::kMaxNodes];    // the first leaf that sees the same numbers
  std::unique_ptr<Entry[]> entries_;  // [size of the rule, batch_size]
};

}  // namespace attn_mask
