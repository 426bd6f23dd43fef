#pragma once

// What one thread of the prepare step's kernel does; see bodies.h.

#include "cuda/grid.h"
#include "rule/device_tables.h"

namespace attn_mask {

/// Whether key `key` of row `row` of a padding is visible.
ATTN_MASK_INLINE bool visible_body(const TableJob& job, int64_t row, int64_t key) {
  return key < job.length && job.padding.attends({row, 0, 0, 0}, {key, key});
}

/// What a thread finds in its part of a row of ids or positions.
struct RunsOfPart {
  int64_t first_start;  // the row's length where no run begins in the part
  int64_t last_start;   // -1 there
  int64_t first_id;     // of the runs that begin here, without negative ones; -1: none
  int64_t last_id;
  int32_t negative;  // runs of negative ids
  bool ascending;    // the others go up
};

/// The runs of one row of a table, found by the threads of a block, each of which has one part of
/// the row. Every thread runs `find`, then, after a barrier, `write`.
struct RowRuns {
  const TableJob& job;
  int64_t row;

  ATTN_MASK_INLINE bool begins(int64_t position) const {
    const Table& table = job.table;
    if (position == 0) {
      return true;
    }
    if (job.kind == TableJob::Kind::kSame) {
      return table.at(row, position) != table.at(row, position - 1);
    }
    return table.position_at(row, position) != table.position_at(row, position - 1) + 1;
  }

  ATTN_MASK_INLINE RunsOfPart find(Interval part) const {
    RunsOfPart found{job.length, -1, -1, -1, 0, true};
    ATTN_MASK_ONE_BY_ONE
    for (int64_t position = part.begin; position < part.end; ++position) {
      if (!begins(position)) {
        continue;
      }
      if (found.last_start < 0) {
        found.first_start = position;
      }
      found.last_start = position;
      if (job.kind != TableJob::Kind::kSame) {
        continue;
      }
      const int64_t id = job.table.at(row, position);
      if (id < 0) {
        ++found.negative;
        continue;
      }
      found.ascending = found.ascending && found.last_id < id;
      found.first_id = found.first_id < 0 ? id : found.first_id;
      found.last_id = id;
    }
    return found;
  }

  /// By all that the threads have found.
  ATTN_MASK_INLINE void write(Interval part, const RunsOfPart* found, int64_t thread,
                              int64_t threads) const {
    int64_t begin = 0;
    ATTN_MASK_ONE_BY_ONE
    for (int64_t before = thread - 1; before >= 0; --before) {
      if (found[before].last_start >= 0) {
        begin = found[before].last_start;
        break;
      }
    }
    int64_t end = job.length;
    ATTN_MASK_ONE_BY_ONE
    for (int64_t after = thread + 1; after < threads; ++after) {
      if (found[after].last_start >= 0) {
        end = found[after].first_start;
        break;
      }
    }
    ATTN_MASK_ONE_BY_ONE
    for (int64_t position = part.begin; position < part.end; ++position) {
      begin = begins(position) ? position : begin;
      job.begin[row * job.length + position] =
          static_cast<int32_t>(is_of_none(position) ? position : begin);
    }
    ATTN_MASK_ONE_BY_ONE
    for (int64_t position = part.end - 1; position >= part.begin; --position) {
      job.end[row * job.length + position] =
          static_cast<int32_t>(is_of_none(position) ? position : end);
      end = begins(position) ? position : end;
    }
    if (thread == 0) {
      job.is_once[row] = is_once(found, threads) ? 1 : 0;
    }
  }

 private:
  ATTN_MASK_INLINE bool is_of_none(int64_t position) const {
    return job.negative_is_none && job.table.at(row, position) < 0;
  }

  /// Whether ids are seen to have one run each: those of documents go up, but for one run of -1.
  ATTN_MASK_INLINE bool is_once(const RunsOfPart* found, int64_t threads) const {
    int64_t last = -1;
    int64_t negative = 0;
    bool ascending = true;
    ATTN_MASK_ONE_BY_ONE
    for (int64_t i = 0; i < threads; ++i) {
      negative += found[i].negative;
      if (found[i].first_id >= 0) {
        ascending = ascending && found[i].ascending && last < found[i].first_id;
        last = found[i].last_id;
      }
    }
    return ascending && (job.negative_is_none || negative <= 1);
  }
};

}  // namespace attn_mask
