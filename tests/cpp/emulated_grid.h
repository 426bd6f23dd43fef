#pragma once

// Runs the bodies of CUDA kernels on the host: every thread of every block in turn, up to a
// barrier, then on from there. Mirrors the shells in cuda/kernels.cu.

#include <vector>

#include "cuda/block_mask_bodies.h"
#include "cuda/mask_bodies.h"
#include "cuda/prepare_bodies.h"

namespace attn_mask::test {

/// Room for the words of every lane that wait.
struct Stacks {
  std::vector<uint64_t> memory;
  int64_t threads;

  Stacks(int64_t threads, int32_t depth)
      : memory(static_cast<size_t>(threads * depth + 1)), threads(threads) {}
  WordStack of(int64_t thread) { return {memory.data() + thread, threads}; }
};

template <typename T>
void emulate_write_mask(const MaskParams& params) {
  const MaskLaunch launch = mask_launch<T>(params);
  Stacks stacks(kLanes, launch.plan.depth);
  const int64_t parts = (launch.groups + launch.per_part - 1) / launch.per_part;
  for (int64_t row = 0; row < params.rows(); ++row) {
    for (int64_t part = 0; part < parts; ++part) {
      RowWriter<T> writer(launch, row);
      if (params.unmasking.wanted) {
        bool visible = false;
        for (int64_t i = 0; i < launch.groups * kLanes && !visible; ++i) {
          visible = writer.word(i / kLanes, i % kLanes, stacks.of(i % kLanes)) != 0;
        }
        if (!visible) {
          writer.unmask();
        }
      }
      const Interval groups =
          intersect({part * launch.per_part, (part + 1) * launch.per_part}, {0, launch.groups});
      for (int64_t group = groups.begin; group < groups.end; ++group) {
        alignas(8) uint64_t words[kLanes];
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          words[lane] = writer.word(group, lane, stacks.of(lane));
        }
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          if (launch.by_words) {
            writer.write_packs(group, lane, words);
          } else {
            writer.write_pack(group * kLanes + lane, static_cast<uint32_t>(words[lane]));
          }
        }
      }
    }
  }
}

inline void emulate_prepare(const DeviceTables& tables, int64_t threads) {
  for (int32_t number = 0; number < tables.size; ++number) {
    const TableJob& job = tables.jobs[number];
    for (int64_t row = 0; row < job.rows; ++row) {
      if (job.kind == TableJob::Kind::kVisible) {
        const int64_t words = (job.length + kWordSize - 1) / kWordSize;
        for (int64_t key = 0; key < words * kWordSize; ++key) {
          uint64_t& word = job.bits[row * words + key / kWordSize];
          word = (key % kWordSize == 0 ? 0 : word) |
                 static_cast<uint64_t>(visible_body(job, row, key)) << key % kWordSize;
        }
        continue;
      }
      const RowRuns runs{job, row};
      std::vector<RunsOfPart> found;
      for (int64_t thread = 0; thread < threads; ++thread) {
        found.push_back(runs.find(part_of(job.length, thread, threads)));
      }
      for (int64_t thread = 0; thread < threads; ++thread) {
        runs.write(part_of(job.length, thread, threads), found.data(), thread, threads);
      }
    }
  }
}

/// A problem as the device sees it, with tables prepared there. Owns what its rule points to.
template <typename Task>
struct DevicePrepared {
  Task params;
  std::vector<uint64_t> memory;

  DevicePrepared(const Task& of, int64_t threads) : params(of) {
    const DeviceTables tables(params, [&](size_t bytes) {
      memory.assign(bytes / 8 + 1, 0xA5A5A5A5A5A5A5A5U);
      return static_cast<void*>(memory.data());
    });
    emulate_prepare(tables, threads);
  }
};

inline void emulate_block_states(const BlockMaskParams& params, int64_t threads) {
  const BlockStatesLaunch launch(params);
  Stacks stacks(threads, launch.plan.depth);
  for (int64_t index = 0; index < launch.lines(); ++index) {
    const BlockLine line(launch, index);
    for (int64_t thread = 0; thread < threads; ++thread) {
      line.guess_body({0, launch.kv_blocks}, thread, threads);
    }
    for (int64_t block = 0; block < launch.kv_blocks; ++block) {
      if (line.states[block] != BlockState::kUnknown) {
        continue;
      }
      bool some = false;
      bool all = true;
      for (int64_t thread = 0; thread < threads; ++thread) {
        const BlockContent content = line.words_body(block, thread, threads, stacks.of(thread));
        some = some || content.some;
        all = all && content.all;
      }
      line.states[block] = state_of(some, all);
    }
  }
}

}  // namespace attn_mask::test
