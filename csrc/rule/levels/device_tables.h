#pragma once

#include <algorithm>
#include <cstddef>
#include <functional>

#include "rule/problem.h"

namespace attn_mask {

/// One table of a rule, and where the device writes what kernels need of it.
struct TableJob {
  enum class Kind : int32_t {
    kVisible,  // padding: a bit for each key
    kSame,     // ids: bounds of runs of equal ones
    kAffine,   // positions: bounds of runs that go up by 1 each
  };

  Kind kind;
  bool negative_is_none;  // of ids
  int64_t rows;
  int64_t length;
  union {
    Padding padding;
    Table table;
  };
  uint64_t* bits;    // [rows, (length + 63) / 64]
  int32_t* begin;    // [rows, length]
  int32_t* end;      // [rows, length]
  int32_t* repeats;  // [rows], 0 before
  uint64_t* edges;   // [rows, parts()], 0 before: what parts of a row tell each other

  /// Positions of a row to one block of threads.
  static constexpr int64_t kPart = 2048;

  ATTN_MASK_INLINE int64_t parts() const { return (length + kPart - 1) / kPart; }
};

/// The prepare step on a device, one launch. Handed to the kernel by value.
struct DeviceTables {
  static constexpr int32_t kMaxJobs = 16;

  TableJob jobs[kMaxJobs];
  int32_t size;
  void* zeroed;  // to be set to 0 before
  size_t zeroed_bytes;

  /// Plans the step for a problem, whose rule will then point into memory that `allocate` gives
  /// (bytes, at least one; device memory, 8 bytes aligned). Tables that are large beside the mask,
  /// or the 17th and more, stay as they are.
  DeviceTables(Problem& problem, const std::function<void*(size_t bytes)>& allocate);

  int64_t most_rows() const {
    return std::max_element(jobs, jobs + size,
                            [](const auto& a, const auto& b) { return a.rows < b.rows; })
        ->rows;
  }

  int64_t longest() const {
    return std::max_element(jobs, jobs + size,
                            [](const auto& a, const auto& b) { return a.length < b.length; })
        ->length;
  }
};

static_assert(sizeof(DeviceTables) <= 4096, "kernel parameters");

}  // namespace attn_mask
