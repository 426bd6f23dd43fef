#include "rule/prepare.h"

#include <cstddef>
#include <unordered_set>

namespace attn_mask {

PreparedTables::PreparedTables(Rule& rule, int64_t batch_size) {
  for (int32_t i = 0; i < rule.size; ++i) {
    if (rule.nodes[i].kind == Rule::Kind::kSameId) {
      prepare(rule.nodes[i].same_id.ids, batch_size);
    }
  }
  for (int32_t i = 0; i < rule.steps_size; ++i) {
    if (rule.steps[i].table.exists()) {
      prepare(rule.steps[i].table, batch_size);
    }
  }
}

void PreparedTables::prepare(Table& table, int64_t batch_size) {
  const int64_t rows = table.batch_stride == 0 ? 1 : batch_size;
  const int64_t n = table.length;
  const auto total = static_cast<std::size_t>(rows * n);
  Runs runs;
  runs.same_begin.resize(total);
  runs.same_end.resize(total);
  runs.affine_end.resize(total);
  runs.same_is_once.assign(static_cast<std::size_t>(rows), 1);
  std::unordered_set<int64_t> seen;
  for (int64_t row = 0; row < rows; ++row) {
    int64_t* begin = runs.same_begin.data() + row * n;
    int64_t* end = runs.same_end.data() + row * n;
    int64_t* affine = runs.affine_end.data() + row * n;
    seen.clear();
    for (int64_t i = 0; i < n; ++i) {
      const int64_t value = table.at(row, i);
      const bool goes_on = i > 0 && value == table.at(row, i - 1);
      begin[i] = goes_on ? begin[i - 1] : i;
      if (!goes_on && value >= 0 && !seen.insert(value).second) {
        runs.same_is_once[static_cast<std::size_t>(row)] = 0;
      }
    }
    for (int64_t i = n - 1; i >= 0; --i) {
      const bool last = i == n - 1;
      end[i] = !last && begin[i + 1] == begin[i] ? end[i + 1] : i + 1;
      affine[i] = !last && table.position_at(row, i + 1) == table.position_at(row, i) + 1
                      ? affine[i + 1]
                      : i + 1;
    }
  }
  table.runs = {runs.same_begin.data(), runs.same_end.data(), runs.affine_end.data(),
                runs.same_is_once.data()};
  runs_.push_back(std::move(runs));
}

}  // namespace attn_mask
