#include "rule/levels/device_tables.h"

#include <algorithm>
#include <array>
#include <limits>

#include "rule/levels/runs.h"

namespace attn_mask {
namespace {

int64_t words_of(int64_t length) { return (length + 63) / 64; }

/// Memory of one job: offsets from the common memory's begin.
struct Place {
  size_t bits;
  size_t begin;
  size_t end;
  size_t repeats;
  size_t edges;
};

}  // namespace

DeviceTables::DeviceTables(Problem& problem, const std::function<void*(size_t bytes)>& allocate)
    : size(0), zeroed(nullptr), zeroed_bytes(0) {
  Rule& rule = problem.rule;
  std::array<Padding*, kMaxJobs> paddings{};
  std::array<Table*, kMaxJobs> tables{};
  const auto add = [&](TableJob job, int64_t batch_stride) {
    job.rows = batch_stride == 0 ? 1 : problem.batch_size;
    const bool pays = size < kMaxJobs && job.length <= std::numeric_limits<int32_t>::max() &&
                      is_worth_preparing(problem, job.rows, job.length);
    if (pays) {
      jobs[size] = job;
    }
    return pays;
  };
  const auto add_table = [&](TableJob::Kind kind, Table& table, bool negative_is_none) {
    TableJob job{};
    job.kind = kind;
    job.negative_is_none = negative_is_none;
    job.table = table;
    job.length = table.length;
    if (add(job, table.batch_stride)) {
      tables[static_cast<size_t>(size++)] = &table;
    }
  };
  for (int32_t i = 0; i < rule.size; ++i) {
    Rule::Node& node = rule.nodes[i];
    const auto end = [&] { return positions_read(problem, node.step_begin, node.step_end).end; };
    if (node.kind == Rule::Kind::kSameId) {
      Table& ids = node.same_id.ids;
      ids.length = std::min(ids.length, std::max<int64_t>(0, end()));
      add_table(TableJob::Kind::kSame, ids, node.same_id.negative_is_none);
    } else if (node.kind == Rule::Kind::kPadding && !node.padding.by_column &&
               node.padding.head_stride == 0 && node.padding.q_stride == 0) {
      Padding& padding = node.padding;
      TableJob job{};
      job.kind = TableJob::Kind::kVisible;
      job.length = std::min(padding.length, std::max<int64_t>(0, end()));
      job.padding = padding;
      if (add(job, padding.batch_stride)) {
        paddings[static_cast<size_t>(size++)] = &padding;
      }
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
  size_t bytes = 0;
  const auto reserve = [&](int64_t elements, size_t element_size) {
    const size_t offset = bytes;
    bytes += (static_cast<size_t>(elements) * element_size + 7) / 8 * 8;
    return offset;
  };
  std::array<Place, kMaxJobs> places{};
  for (int32_t i = 0; i < size; ++i) {
    const TableJob& job = jobs[i];
    Place& place = places[static_cast<size_t>(i)];
    if (job.kind != TableJob::Kind::kVisible) {
      place.repeats = reserve(job.rows, sizeof(int32_t));
      place.edges = reserve(job.rows * job.parts(), sizeof(uint64_t));
    }
  }
  zeroed_bytes = bytes;
  for (int32_t i = 0; i < size; ++i) {
    const TableJob& job = jobs[i];
    Place& place = places[static_cast<size_t>(i)];
    if (job.kind == TableJob::Kind::kVisible) {
      place.bits = reserve(job.rows * words_of(job.length), sizeof(uint64_t));
    } else {
      place.begin = reserve(job.rows * job.length, sizeof(int32_t));
      place.end = reserve(job.rows * job.length, sizeof(int32_t));
    }
  }
  auto* const memory = static_cast<char*>(allocate(std::max<size_t>(1, bytes)));
  zeroed = memory;
  for (int32_t i = 0; i < size; ++i) {
    TableJob& job = jobs[i];
    const Place& place = places[static_cast<size_t>(i)];
    if (Padding* const padding = paddings[static_cast<size_t>(i)]) {
      job.bits = reinterpret_cast<uint64_t*>(memory + place.bits);
      padding->mask = job.bits;
      padding->batch_stride = job.rows == 1 ? 0 : words_of(job.length);
      padding->length = job.length;
      padding->element_size = Padding::kBits;
    } else {
      job.begin = reinterpret_cast<int32_t*>(memory + place.begin);
      job.end = reinterpret_cast<int32_t*>(memory + place.end);
      job.repeats = reinterpret_cast<int32_t*>(memory + place.repeats);
      job.edges = reinterpret_cast<uint64_t*>(memory + place.edges);
      tables[static_cast<size_t>(i)]->bounds = {job.begin, job.end};
      tables[static_cast<size_t>(i)]->runs.repeats = job.repeats;
    }
  }
}

}  // namespace attn_mask
