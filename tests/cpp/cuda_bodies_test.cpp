// Runs what each CUDA thread does for every block and thread of a grid, on the host, and compares
// with the CPU kernels bit for bit.

#include <gtest/gtest.h>

#include <random>

#include "bits.h"
#include "cpu/block_mask.h"
#include "cpu/kernels.h"
#include "emulated_grid.h"
#include "format/additive.h"
#include "format/boolean.h"
#include "reference.h"
#include "rule/prepare.h"

namespace attn_mask {
namespace {

/// Memory aligned as the caching allocator's, with a guard after it.
struct DeviceMemory {
  explicit DeviceMemory(size_t size) : size(size), packs(size / 16 + 2) {
    std::memset(packs.data(), 0xA5, packs.size() * 16);
  }
  uint8_t* data() { return reinterpret_cast<uint8_t*>(packs.data()); }
  test::Bytes contents() { return {data(), data() + size}; }
  bool guard_intact() {
    for (size_t i = size; i < packs.size() * 16; ++i) {
      if (data()[i] != 0xA5) {
        return false;
      }
    }
    return true;
  }

  size_t size;
  std::vector<Pack> packs;
};

template <typename T>
void expect_mask(MaskTask task, int64_t threads) {
  test::Bytes want(static_cast<size_t>(test::reach(task)) * sizeof(T), 0xA5);
  task.out = want.data();
  isa_default::kKernels.write_tiles(task, {task.kv_length, 1}, 0, task.rows());
  // Outputs of a user's may begin at any element.
  for (const int64_t offset : {0, 1, 3}) {
    DeviceMemory got(want.size() + static_cast<size_t>(offset) * sizeof(T));
    task.out = got.data() + offset * static_cast<int64_t>(sizeof(T));
    test::emulate_write_mask<T>(test::DevicePrepared(task, threads).task);
    const test::Bytes all = got.contents();
    ASSERT_EQ(test::Bytes(all.begin() + offset * static_cast<int64_t>(sizeof(T)), all.end()), want)
        << "b=" << task.batch_size << " q=" << task.q_length << " kv=" << task.kv_length
        << " element " << sizeof(T);
    ASSERT_TRUE(got.guard_intact()) << "written after the mask";
  }
}

void expect_mask(const MaskTask& task, int64_t threads) {
  with_bits(task.format.element_size,
            [&](auto bits) { expect_mask<decltype(bits)>(task, threads); });
}

constexpr DenseFormat kFormats[] = {kBoolean, kAdditiveBFloat16, kAdditiveFloat32,
                                    kAdditiveFloat64};

TEST(WriteMaskBody, AgreesWithTheCpuKernel) {
  std::mt19937 random(21);
  int64_t unmasked = 0;
  for (const DenseFormat& format : kFormats) {
    const int64_t pack = 16 / format.element_size;
    // Row lengths around the pack's width, down to several rows in one pack.
    for (const int64_t kv_length : {int64_t{1}, int64_t{2}, int64_t{3}, pack - 1, pack, pack + 1,
                                    3 * pack + 1, int64_t{70}, int64_t{2200}}) {
      if (kv_length == 0) {
        continue;
      }
      for (int trial = 0; trial < (kv_length > 100 ? 12 : 40); ++trial) {
        MaskTask task{};
        task.batch_size = 1 + random() % 3;
        task.heads = 1 + random() % 2;
        task.q_length = 1 + random() % 5;
        task.kv_length = kv_length;
        task.q_positions.offset = random() % 40;
        task.format = format;
        const test::RandomPadding padding(random, 1 << random() % 4, task.batch_size, task.q_length,
                                          kv_length, 1 + random() % 2, random() % 2 == 0);
        task.rule = make_rule(Causal{});
        if (random() % 2 == 0) {
          task.rule =
              task.rule & make_rule(SlidingWindow{static_cast<int64_t>(random() % 30), kOpen});
        }
        if (random() % 2 == 0) {
          task.rule = task.rule & make_rule(padding.leaf);
        }
        std::vector<uint8_t> masked_rows;
        if (random() % 3 == 0) {
          masked_rows = test::reference_masked_rows(task);
          task.unmasking = {masked_rows.data(), 0x5A, true};
          unmasked += std::count(masked_rows.begin(), masked_rows.end(), 1);
        }
        test::set_contiguous(task);
        if (random() % 2 == 0) {
          test::set_random_strides(task, random);
        }
        expect_mask(task, 1 + random() % 8);
      }
    }
  }
  EXPECT_GT(unmasked, 20);  // the trials do contain rows without a key
}

template <typename T>
void expect_unmask(UnmaskTask task, int64_t threads) {
  const test::Bytes want = test::reference_unmask(task);
  for (const int64_t offset : {0, 1, 3}) {
    const auto before = static_cast<size_t>(offset) * sizeof(T);
    DeviceMemory got(want.size() + before);
    task.written = got.data() + before;
    for (int64_t index = 0; index < task.in.rows(); ++index) {
      const UnmaskRow<T> row(task, index);
      bool attended = false;
      for (int64_t thread = 0; thread < threads; ++thread) {
        attended = row.attended_body(thread, threads) || attended;
      }
      for (int64_t thread = 0; thread < threads; ++thread) {
        row.write_body(!attended, thread, threads);
      }
    }
    const test::Bytes all = got.contents();
    ASSERT_EQ(test::Bytes(all.begin() + static_cast<int64_t>(before), all.end()), want);
    ASSERT_TRUE(got.guard_intact()) << "written after the mask";
  }
}

TEST(UnmaskBodies, AgreeWithTheReference) {
  std::mt19937 random(22);
  for (int trial = 0; trial < 300; ++trial) {
    UnmaskTask task{};
    task.in.element_size = 2 << random() % 3;
    task.in.length = 1 + random() % 30;
    task.in.stride = 1 + random() % 2;
    task.in.sizes[0] = 1 + random() % 2;
    task.in.sizes[1] = 1 + random() % 2;
    task.in.sizes[2] = 1 + random() % 4;
    task.in.strides[2] = task.in.length * task.in.stride;
    task.in.strides[1] = random() % 3 == 0 ? 0 : task.in.sizes[2] * task.in.strides[2];
    task.in.strides[0] = task.in.sizes[1] * task.in.sizes[2] * task.in.strides[2];
    const int64_t elements = task.in.sizes[0] * task.in.strides[0];
    const uint64_t sign = uint64_t{1} << (8 * task.in.element_size - 1);
    test::Bytes memory(static_cast<size_t>(elements * task.in.element_size));
    for (int64_t i = 0; i < elements; ++i) {
      test::put(memory, i, task.in.element_size, random() % 20 != 0 ? sign | 0x7B : 0);
    }
    task.in.data = memory.data();
    task.is_min = bits_between(sign | 0x7B, sign | 0x7B);
    task.sign = sign;
    test::set_random_output(task, random);
    const int64_t threads = 1 + random() % 40;
    with_bits(task.in.element_size,
              [&](auto bits) { expect_unmask<decltype(bits)>(task, threads); });
  }
}

TEST(Grid, BlocksOfARowAreWholeWarps) {
  EXPECT_EQ(threads_for_row(0), 32);
  EXPECT_EQ(threads_for_row(1), 32);
  EXPECT_EQ(threads_for_row(33), 64);
  EXPECT_EQ(threads_for_row(100000), kThreadsPerBlock);
}

/// A block mask's numbers, in the order of the task's lists.
struct BlockMaskNumbers {
  std::vector<int32_t> memory[2][2][2];  // keys or queries; partial or full; counts and indices

  explicit BlockMaskNumbers(BlockMaskTask& task) {
    const int64_t stored = task.batch_size * task.stored_heads;
    for (size_t kind = 0; kind < 2; ++kind) {
      task.kv[kind] = lists(0, kind, stored * task.q_blocks(), task.kv_width);
      task.q[kind] = lists(1, kind, stored * task.kv_blocks(), task.q_width);
    }
  }

 private:
  BlockLists lists(size_t direction, size_t kind, int64_t lines, int64_t width) {
    auto& [counts, indices] = memory[direction][kind];
    counts.assign(static_cast<size_t>(lines), -7);
    indices.assign(static_cast<size_t>(lines * width), -7);
    return {counts.data(), indices.data()};
  }
};

bool emulate_block_lists(const BlockMaskTask& task, int64_t threads) {
  bool fits = true;
  const BlockListsParams params(task);
  for (int64_t index = 0; index < params.lines(); ++index) {
    const ListedLine line = listed_line(params, index);
    std::vector<int64_t> counts;
    for (int64_t thread = 0; thread < threads; ++thread) {
      counts.push_back(line.count_body(part_of(line.total, thread, threads)));
    }
    for (int64_t thread = 0; thread < threads; ++thread) {
      fits = line.list_body(part_of(line.total, thread, threads), counts.data(), thread, threads) &&
             fits;
    }
  }
  return fits;
}

TEST(BlockMaskBodies, AgreeWithTheCpuKernel) {
  std::mt19937 random(31);
  for (int trial = 0; trial < 400; ++trial) {
    BlockMaskTask task{};
    task.batch_size = 1 + random() % 2;
    task.heads = 1 + random() % 2;
    task.stored_heads = task.heads + random() % 2;
    task.q_length = 1 + random() % 39;
    task.kv_length = 1 + random() % 39;
    task.q_block = 1 + random() % 9;
    task.kv_block = 1 + random() % 9;
    task.separate_full = random() % 4 != 0;
    task.q_positions.offset = random() % 20;
    task.kv_positions.offset = random() % 9;
    const test::RandomPadding padding(random, 1 << random() % 4, task.batch_size, task.q_length + 1,
                                      task.kv_length + 9, 1 + random() % 2, random() % 2 == 0);
    std::vector<int64_t> ids(80);
    for (size_t i = 0; i < ids.size(); ++i) {
      ids[i] = i == 0 ? 0 : ids[i - 1] + (random() % 9 == 0 ? 1 : 0);
    }
    const Rule leaves[] = {
        make_rule(Causal{}), make_rule(SlidingWindow{static_cast<int64_t>(random() % 20), 3}),
        make_rule(test::chunk(static_cast<int64_t>(1 + random() % 20))),
        make_rule(SameId{{{ids.data(), 8}, 0, 1, 80, {}, {}}, false}), make_rule(padding.leaf)};
    task.rule = leaves[random() % 5];
    for (int more = random() % 3; more > 0; --more) {
      const Rule& leaf = leaves[random() % 5];
      task.rule = random() % 3 == 0 ? task.rule | leaf : task.rule & leaf;
    }
    const auto narrower = [&](int64_t blocks) {
      return random() % 3 == 0 ? static_cast<int64_t>(random() % (blocks + 1)) : blocks;
    };
    task.kv_width = narrower(task.kv_blocks());
    task.q_width = narrower(task.q_blocks());

    BlockMaskTask on_host = task;
    BlockMaskNumbers want(on_host);
    const PreparedTables prepared(on_host);
    const auto longest = write_block_mask_cpu(on_host);
    std::vector<BlockState> host_states(
        static_cast<size_t>(task.planes() * task.q_blocks() * task.kv_blocks()));
    on_host.states = host_states.data();
    find_block_states_cpu(on_host);

    std::vector<BlockState> states(host_states.size(), BlockState::kUnknown);
    task.states = states.data();
    BlockMaskNumbers got(task);
    const int64_t threads = 1 + random() % 70;
    test::emulate_block_states(task, threads);
    ASSERT_EQ(states, host_states) << "trial " << trial;
    states.assign(states.size(), BlockState::kUnknown);
    test::emulate_block_states(test::DevicePrepared(task, threads).task, threads);
    ASSERT_EQ(states, host_states) << "trial " << trial << ", prepared";
    const bool fits = emulate_block_lists(task, threads);
    EXPECT_EQ(fits, longest->kv <= task.kv_width && longest->q <= task.q_width);
    for (size_t direction = 0; direction < 2; ++direction) {
      for (size_t kind = 0; kind < 2; ++kind) {
        for (size_t list = 0; list < 2; ++list) {
          ASSERT_EQ(got.memory[direction][kind][list], want.memory[direction][kind][list])
              << "trial " << trial << ": " << direction << kind << list;
        }
      }
    }
    // By states, too, the CPU kernel lists the same.
    BlockMaskNumbers again(on_host);
    write_block_mask_cpu(on_host);
    EXPECT_EQ(again.memory[1][0][1], want.memory[1][0][1]);
  }
}

}  // namespace
}  // namespace attn_mask
