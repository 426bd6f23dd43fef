#pragma once

// Runs the bodies of CUDA kernels on the host: every thread of every block in turn, up to a
// barrier, then on from there. Mirrors the shells in cuda/*.cu.

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/block_mask_bodies.h"
#include "cuda/document_bodies.h"
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
      Interval keys[Rule::kMaxNodes];
      for (int64_t lane = 0; lane < launch.plan.size; ++lane) {
        keys[lane] = writer.keys_body(lane);
      }
      const auto begin = static_cast<int32_t>(part * launch.per_part);
      const int32_t end = std::min(begin + launch.per_part, launch.groups);
      alignas(8) uint64_t words[kLanes];
      const auto find_words = [&](int32_t group) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          words[lane] = writer.word(group, lane, keys, stacks.of(lane));
        }
      };
      const auto visible_in = [&](int32_t group) {
        find_words(group);
        return std::any_of(words, words + kLanes, [](uint64_t word) { return word != 0; });
      };
      if (params.unmasking.wanted) {
        bool visible = visible_in(writer.likely_group(begin, end));
        for (int32_t other = 0; other < launch.groups && !visible; ++other) {
          visible = visible_in(other);
        }
        if (!visible) {
          writer.unmask();
        }
      }
      for (int32_t group = begin; group < end; ++group) {
        find_words(group);
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

/// The words of a part of a row, by the bits of each lane of each warp.
template <typename Body>
std::vector<uint32_t> words_of_part(int64_t first, Body body) {
  std::vector<uint32_t> words(TableJob::kPart / kLanes);
  for (int64_t warp = 0; warp < kWarps; ++warp) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const uint32_t bits = body(first + warp * kLanes * kPerLane + lane);
      for (int64_t i = 0; i < kPerLane; ++i) {
        words[static_cast<size_t>(warp * kPerLane + i)] |= (bits >> i & 1U) << lane;
      }
    }
  }
  return words;
}

inline Heads heads_of(const std::vector<uint32_t>& words, int64_t first) {
  uint64_t filled = 0;
  for (size_t i = 0; i < words.size(); ++i) {
    filled |= uint64_t{words[i] != 0} << i;
  }
  return {words.data(), filled, first};
}

inline std::vector<uint32_t> head_words(const RowRuns& runs, int64_t first) {
  return words_of_part(first, [&](int64_t from) { return runs.heads_body(from); });
}

/// What a warp finds, the parts in `step`'s direction one by one.
inline int64_t nearest_head(const RowRuns& runs, int64_t part, int64_t step, int64_t none) {
  for (part += step; 0 <= part && part < runs.job.parts(); part += step) {
    Edges edges{runs.job.edges[runs.row * runs.job.parts() + part]};
    if (!edges.told()) {
      const auto words = head_words(runs, part * TableJob::kPart);
      edges = Edges::of(heads_of(words, part * TableJob::kPart));
    }
    if (edges.has_head()) {
      return edges.head(step);
    }
  }
  return none;
}

/// The parts of a row in an order of their own, as blocks of threads may be.
inline void emulate_prepare(const DeviceTables& tables) {
  std::mt19937 random(1);
  if (tables.zeroed_bytes > 0) {
    std::memset(tables.zeroed, 0, tables.zeroed_bytes);
  }
  for (int32_t number = 0; number < tables.size; ++number) {
    const TableJob& job = tables.jobs[number];
    std::vector<int64_t> parts(static_cast<size_t>(job.parts()));
    std::iota(parts.begin(), parts.end(), 0);
    for (int64_t row = 0; row < job.rows; ++row) {
      std::shuffle(parts.begin(), parts.end(), random);
      for (const int64_t part : parts) {
        const int64_t first = part * TableJob::kPart;
        const RowRuns runs{job, row};
        if (job.kind == TableJob::Kind::kVisible) {
          const auto words =
              words_of_part(first, [&](int64_t from) { return visible_body(job, row, from); });
          const int64_t size = (job.length + kWordSize - 1) / kWordSize;
          for (int64_t i = 0; i < TableJob::kPart / kWordSize && first / kWordSize + i < size;
               ++i) {
            job.bits[row * size + first / kWordSize + i] =
                words[static_cast<size_t>(2 * i)] |
                static_cast<uint64_t>(words[static_cast<size_t>(2 * i + 1)]) << 32;
          }
          continue;
        }
        const auto words = head_words(runs, first);
        const Heads heads = heads_of(words, first);
        job.edges[row * job.parts() + part] = Edges::of(heads).bits;
        const Interval around{nearest_head(runs, part, -1, 0),
                              nearest_head(runs, part, 1, job.length)};
        for (int64_t thread = 0; thread < kThreadsPerBlock; ++thread) {
          job.repeats[row] += runs.write_body(heads, around, thread);
        }
      }
    }
  }
}

/// A problem as the device sees it, with tables prepared there. Owns what its rule points to.
template <typename Task>
struct DevicePrepared {
  Task params;
  std::vector<uint64_t> memory;

  explicit DevicePrepared(const Task& of) : params(of) {
    const DeviceTables tables(params, [&](size_t bytes) {
      memory.assign(bytes / 8 + 1, 0xA5A5A5A5A5A5A5A5U);
      return static_cast<void*>(memory.data());
    });
    emulate_prepare(tables);
  }
};

/// A chunk at a time; what warps find is added up one after the other.
inline void emulate_find_documents(const DocumentParams& params) {
  DocumentStarts seen{0, 0};
  int64_t longest = 0;
  bool rise = true;
  for (int64_t chunk = 0; chunk < params.total(); chunk += kTokensOfChunk) {
    for (int64_t warp = 0; warp < kDocumentThreads / kLanes; ++warp) {
      const int64_t first = chunk + warp * kTokensOfWarp;
      uint32_t words[kTokensOfLane] = {};
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const LaneStarts mine = starts_body(params, first + lane);
        rise = rise && mine.rise;
        for (int32_t i = 0; i < kTokensOfLane; ++i) {
          words[i] |= (mine.begins >> i & 1U) << lane;
        }
      }
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        longest = std::max<int64_t>(longest, write_borders_body(params, words, seen, first, lane));
      }
      for (int32_t i = 0; i < kTokensOfLane; ++i) {
        seen.add(words[i], first + i * kLanes);
      }
    }
  }
  params.set_found(seen.count, std::max(longest, params.total() - seen.last), rise);
  for (int64_t thread = 0; thread < kDocumentThreads; ++thread) {
    fill_borders_body(params, seen.count, thread);
  }
}

inline void emulate_block_states(const BlockMaskParams& params) {
  const BlockStatesLaunch launch(params);
  Stacks stacks(1, launch.plan.depth);
  for (int64_t index = 0; index < launch.lines(); ++index) {
    const BlockLine line(launch, index);
    std::vector<LineKeys> keys;
    for (int32_t step = 0; step < launch.plan.size; ++step) {
      keys.push_back(line.keys_body(step));
    }
    for (int64_t block = 0; block < launch.kv_blocks; ++block) {
      line.states[block] = line.guess_body(block, keys.data());
      if (line.states[block] != BlockState::kUnknown) {
        continue;
      }
      BlockContent content{false, line.is_whole(block)};
      const int64_t per_lane = (line.words() + kLanes - 1) / kLanes;
      for (int64_t word = 0; word < per_lane * kLanes; ++word) {
        const BlockContent of_lane = line.word_body(block, word, stacks.of(0));
        content = {content.some || of_lane.some, content.all && of_lane.all};
      }
      line.states[block] = content.state();
    }
  }
}

/// False where lines have more blocks than they can store.
inline bool emulate_block_lists(const BlockMaskParams& params) {
  const BlockListsLaunch launch(params);
  bool fits = true;
  for (int64_t index = 0; index < launch.groups(); ++index) {
    const LineGroup group = launch.group(index);
    for (int64_t kind = 0; kind < (group.separate_full ? 2 : 1); ++kind) {
      for (int64_t line = 0; line < group.lines; ++line) {
        std::vector<uint32_t> words;
        int64_t count = 0;
        for (int64_t block = 0; block < group.total; ++block) {
          words.resize(static_cast<size_t>(block / kLanes + 1));
          words.back() |= uint32_t{group.holds(kind, group.state(line, block))} << block % kLanes;
        }
        for (const uint32_t word : words) {
          count += count_bits(word);
        }
        int64_t before = 0;
        int64_t begin = 0;
        for (const uint32_t word : words) {
          for (int64_t lane = 0; lane < kLanes && !group.is_beyond(begin, word, before, count);
               ++lane) {
            group.list_body(kind, line, begin, word, before, count, lane);
          }
          before += count_bits(word);
          begin += kLanes;
        }
        group.lists[kind].num_blocks[group.stored + line] = static_cast<int32_t>(count);
        fits = fits && count <= group.width;
      }
    }
  }
  return fits;
}

}  // namespace attn_mask::test
