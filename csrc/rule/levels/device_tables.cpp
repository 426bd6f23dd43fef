#include "rule/levels/device_tables.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <variant>

#include "rule/levels/runs.h"

namespace attn_mask {
namespace {

int64_t words_of(int64_t length) { return (length + 63) / 64; }

/// Hands out memory from `base` on: once from 0, to learn how much it is, and then for good.
struct Memory {
  uintptr_t base;
  size_t bytes = 0;

  template <typename T>
  void take(T*& place, int64_t elements) {
    place = reinterpret_cast<T*>(base + bytes);
    bytes += (static_cast<size_t>(elements) * sizeof(T) + 7) / 8 * 8;
  }
};

/// Says where the jobs write. Returns how much of that memory, at its begin, is to be 0 before.
size_t lay_out(TableJob* jobs, int32_t size, Memory& memory) {
  for (TableJob* job = jobs; job < jobs + size; ++job) {
    if (job->kind != TableJob::Kind::kVisible) {
      memory.take(job->repeats, job->rows);
      memory.take(job->edges, job->rows * job->parts());
    }
  }
  const size_t zeroed = memory.bytes;
  for (TableJob* job = jobs; job < jobs + size; ++job) {
    if (job->kind == TableJob::Kind::kVisible) {
      memory.take(job->bits, job->rows * words_of(job->length));
    } else {
      memory.take(job->begin, job->rows * job->length);
      memory.take(job->end, job->rows * job->length);
    }
  }
  return zeroed;
}

/// Has a rule point to what its jobs write.
void point_to(const TableJob& job, Padding& padding) {
  padding.mask = job.bits;
  padding.batch_stride = job.rows == 1 ? 0 : words_of(job.length);
  padding.length = job.length;
  padding.element_size = Padding::kBits;
}

void point_to(const TableJob& job, Table& table) {
  table.bounds = {job.begin, job.end};
  table.runs.repeats = job.repeats;
}

}  // namespace

DeviceTables::DeviceTables(Problem& problem, const std::function<void*(size_t bytes)>& allocate)
    : size(0), zeroed(nullptr), zeroed_bytes(0) {
  Rule& rule = problem.rule;
  std::array<std::variant<Padding*, Table*>, kMaxJobs> sources;
  const auto add = [&](TableJob job, auto* source) {
    job.rows = source->batch_stride == 0 ? 1 : problem.batch_size;
    if (size < kMaxJobs && job.length <= std::numeric_limits<int32_t>::max() &&
        is_worth_preparing(problem, job.rows, job.length)) {
      sources[static_cast<size_t>(size)] = source;
      jobs[size++] = job;
    }
  };
  const auto add_table = [&](TableJob::Kind kind, Table& table, bool negative_is_none) {
    TableJob job{};
    job.kind = kind;
    job.negative_is_none = negative_is_none;
    job.table = table;
    job.length = table.length;
    add(job, &table);
  };
  for (int32_t i = 0; i < rule.size; ++i) {
    Rule::Node& node = rule.nodes[i];
    const auto read_of = [&](int64_t length) {
      const Interval read = positions_read(problem, node.step_begin, node.step_end);
      return std::min(length, std::max<int64_t>(0, read.end));
    };
    if (node.kind == Rule::Kind::kSameId) {
      Table& ids = node.same_id.ids;
      ids.length = read_of(ids.length);
      add_table(TableJob::Kind::kSame, ids, node.same_id.negative_is_none);
    } else if (node.kind == Rule::Kind::kPadding && !node.padding.by_column &&
               node.padding.head_stride == 0 && node.padding.q_stride == 0) {
      TableJob job{};
      job.kind = TableJob::Kind::kVisible;
      job.length = read_of(node.padding.length);
      job.padding = node.padding;
      add(job, &node.padding);
    }
  }
  for (int32_t i = 0; i < rule.steps_size; ++i) {
    if (rule.steps[i].table.exists()) {
      add_table(TableJob::Kind::kAffine, rule.steps[i].table, false);
    }
  }
  if (size == 0) {
    return;
  }
  Memory needed{0};
  zeroed_bytes = lay_out(jobs, size, needed);
  zeroed = allocate(std::max<size_t>(1, needed.bytes));
  Memory memory{reinterpret_cast<uintptr_t>(zeroed)};
  lay_out(jobs, size, memory);
  for (int32_t i = 0; i < size; ++i) {
    std::visit([&](auto* source) { point_to(jobs[i], *source); }, sources[static_cast<size_t>(i)]);
  }
}

}  // namespace attn_mask
