#include "rule/prepare.h"

#include <cstddef>
#include <unordered_set>

namespace attn_mask {
namespace {

// Finding runs takes some twenty times as long as writing an element.
constexpr int64_t kElementsPerEntry = 8;

/// The position behind all that the first `steps` of the chain from `begin` ask a table at.
int64_t end_of_positions(const MaskTask& task, int32_t begin, int32_t end) {
  if (task.q_positions.numbers.data != nullptr || task.kv_positions.numbers.data != nullptr) {
    return kOpen;  // where those lie is data
  }
  int64_t q_end = task.q_positions.offset + task.q_length;
  int64_t key_end = task.kv_positions.offset + task.kv_length;
  for (int32_t i = begin; i < end; ++i) {
    const Rule::Step& step = task.rule.steps[i];
    if (step.table.exists()) {
      return kOpen;
    }
    q_end += step.q_add;
    key_end += step.key_add;
  }
  return q_end > key_end ? q_end : key_end;
}

}  // namespace

PreparedTables::PreparedTables(MaskTask& task) {
  Rule& rule = task.rule;
  for (int32_t i = 0; i < rule.size; ++i) {
    Rule::Node& node = rule.nodes[i];
    if (node.kind == Rule::Kind::kSameId) {
      prepare(node.same_id.ids, task, end_of_positions(task, node.step_begin, node.step_end));
    }
  }
  for (int32_t i = 0; i < rule.steps_size; ++i) {
    if (rule.steps[i].table.exists()) {
      prepare(rule.steps[i].table, task, kOpen);
    }
  }
}

void PreparedTables::prepare(Table& table, const MaskTask& task, int64_t end) {
  const int64_t rows = table.batch_stride == 0 ? 1 : task.batch_size;
  if (end < table.length) {
    table.length = end > 0 ? end : 0;
  }
  const int64_t n = table.length;
  if (n > task.rows() * task.kv_length / rows / kElementsPerEntry) {
    return;
  }
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
