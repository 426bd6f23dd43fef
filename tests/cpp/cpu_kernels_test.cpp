#include <ATen/Version.h>
#include <gtest/gtest.h>

#include <functional>
#include <random>
#include <string>

#include "cpu/kernels.h"
#include "format/additive.h"
#include "format/boolean.h"
#include "reference.h"

namespace attn_mask {
namespace {

struct Isa {
  std::string name;
  const CpuKernels* kernels;
};

/// The instruction sets that this machine can run.
std::vector<Isa> isas() {
  std::vector<Isa> all{{"default", &isa_default::kKernels}};
#if defined(ATTN_MASK_HAS_X86_KERNELS)
  if (__builtin_cpu_supports("avx2")) {
    all.push_back({"avx2", &isa_avx2::kKernels});
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    all.push_back({"avx512", &isa_avx512::kKernels});
  }
#endif
  return all;
}

constexpr DenseFormat kFormats[] = {kBoolean, kAdditiveFloat16, kAdditiveFloat32, kAdditiveFloat64};

/// Writes the task with tiles of `keys` keys, in two ranges, into memory with a guard on either
/// side.
void expect_written(const Isa& isa, MaskTask task, int64_t keys, int64_t split) {
  const test::Bytes want = test::reference_mask(task);
  constexpr size_t kGuard = 64;
  test::Bytes memory(want.size() + 2 * kGuard, 0xA5);
  task.out = memory.data() + kGuard;
  const Tiling tiling{keys, (task.kv_length + keys - 1) / keys};
  const int64_t tiles = task.batch_size * task.q_length * tiling.per_row;
  split = tiles == 0 ? 0 : split % tiles;
  isa.kernels->write_tiles(task, tiling, split, tiles);
  isa.kernels->write_tiles(task, tiling, 0, split);
  const test::Bytes got(memory.begin() + kGuard, memory.end() - kGuard);
  ASSERT_EQ(got, want) << isa.name << " b=" << task.batch_size << " q=" << task.q_length
                       << " kv=" << task.kv_length << " size=" << task.format.element_size;
  for (size_t i = 0; i < kGuard; ++i) {
    ASSERT_EQ(memory[i], 0xA5) << "written before the mask";
    ASSERT_EQ(memory[memory.size() - 1 - i], 0xA5) << "written beyond the mask";
  }
}

TEST(WriteTiles, AgreesWithTheRuleOnEveryInstructionSet) {
  std::mt19937 random(11);
  for (const Isa& isa : isas()) {
    for (int trial = 0; trial < 600; ++trial) {
      MaskTask task{};
      task.batch_size = 1 + random() % 3;
      task.heads = 1;
      task.q_length = 1 + random() % 6;
      task.kv_length = 1 + random() % 150;
      task.q_positions.offset = random() % 120;
      task.format = kFormats[random() % 4];
      const test::RandomPadding padding(random, 1 << random() % 4, task.batch_size, task.q_length,
                                        task.kv_length, 1 + random() % 2, random() % 2 == 0);
      const test::RandomPadding more(random, 1 << random() % 4, task.batch_size, task.q_length,
                                     task.kv_length, 1, false);
      task.rule = make_rule(All{});
      if (random() % 2 == 0) {
        task.rule = task.rule & make_rule(Causal{});
      }
      if (random() % 2 == 0) {
        task.rule =
            task.rule & make_rule(SlidingWindow{static_cast<int64_t>(random() % 50), kOpen});
      }
      if (random() % 4 != 0) {
        task.rule = task.rule & make_rule(padding.leaf);
      }
      if (random() % 4 == 0) {  // two leaves that are evaluated key by key
        task.rule = task.rule & make_rule(more.leaf);
      }
      test::set_contiguous(task);
      if (random() % 3 == 0) {
        test::set_random_strides(task, random);
      }
      expect_written(isa, task, 1 + static_cast<int64_t>(random() % 80), random());
    }
  }
}

TEST(WriteTiles, UnmasksRowsWithoutAKey) {
  std::mt19937 random(14);
  for (const Isa& isa : isas()) {
    for (int trial = 0; trial < 200; ++trial) {
      MaskTask task{};
      task.batch_size = 1 + random() % 3;
      task.heads = 1;
      task.q_length = 1 + random() % 9;
      task.kv_length = task.q_length + static_cast<int64_t>(random() % 40);
      task.q_positions.offset = task.kv_length - task.q_length;
      task.format = kFormats[random() % 4];
      test::RandomPadding padding(random, 1 << random() % 4, task.batch_size, task.q_length,
                                  task.kv_length, 1 + random() % 2, false);
      if (random() % 2 == 0) {  // much of it
        padding.leaf.visible = bits_between(3, 3);
      }
      task.rule = make_rule(Causal{}) & make_rule(padding.leaf);
      if (random() % 2 == 0) {
        task.rule = task.rule & make_rule(SlidingWindow{static_cast<int64_t>(random() % 6), kOpen});
      }
      if (random() % 2 == 0) {  // a tree, not all of whose rows are their hull
        task.rule = task.rule | (make_rule(SlidingWindow{0, 0}) & make_rule(padding.leaf));
      }
      const std::vector<uint8_t> want = test::reference_masked_rows(task);
      std::vector<uint8_t> rows(want.size(), 2);
      isa.kernels->find_masked_rows(task, 0, task.rows(), rows.data());
      ASSERT_EQ(rows, want) << isa.name;
      task.unmasking = {rows.data(), 0x5A, true};
      test::set_contiguous(task);
      expect_written(isa, task, 1 + static_cast<int64_t>(random() % 20), random());
    }
  }
}

TEST(WriteTiles, RowsLongerThanATile) {
  std::mt19937 random(12);
  for (const Isa& isa : isas()) {
    for (const DenseFormat& format : kFormats) {
      const int64_t keys = kTileBytes / format.element_size;
      for (const int64_t kv_length : {keys - 1, keys, keys + 1, 2 * keys + 17}) {
        MaskTask task{};
        task.batch_size = 2;
        task.heads = 1;
        task.q_length = 3;
        task.kv_length = kv_length;
        task.q_positions.offset = kv_length - 3;
        task.format = format;
        const test::RandomPadding padding(random, 8, 2, 3, kv_length, 1, false);
        task.rule =
            make_rule(Causal{}) & make_rule(SlidingWindow{keys, kOpen}) & make_rule(padding.leaf);
        test::set_contiguous(task);
        expect_written(isa, task, keys, 5);
        task.out_strides[3] = 2;
        task.out_strides[2] = 2 * kv_length;
        task.out_strides[0] = task.q_length * task.out_strides[2];
        expect_written(isa, task, keys, 5);
      }
    }
  }
}

UnmaskTask random_rows(std::mt19937& random, int32_t size, test::Bytes& memory) {
  UnmaskTask task{};
  task.in.element_size = size;
  task.in.length = random() % 40;
  task.in.stride = 1 + random() % 2;
  const int64_t row = task.in.length * task.in.stride;
  for (auto& extent : task.in.sizes) {
    extent = 1 + random() % 3;
  }
  task.in.strides[2] = random() % 4 == 0 ? 0 : row;
  task.in.strides[1] = random() % 4 == 0 ? 0 : task.in.sizes[2] * row;
  task.in.strides[0] = task.in.sizes[1] * task.in.sizes[2] * row;
  const int64_t elements = task.in.sizes[0] * task.in.strides[0] + 1;
  memory.assign(static_cast<size_t>(elements * size), 0);
  const uint64_t sign = uint64_t{1} << (8 * size - 1);
  const uint64_t minimum = sign | 0x7B;
  const bool mostly_minimum = random() % 2 == 0;
  for (int64_t i = 0; i < elements; ++i) {
    test::put(memory, i, size, mostly_minimum && random() % 40 != 0 ? minimum : random());
  }
  task.in.data = memory.data();
  task.is_min = bits_between(minimum, minimum);
  task.sign = random() % 4 == 0 ? 0 : sign;
  return task;
}

TEST(UnmaskRows, AgreesWithTheReferenceOnEveryInstructionSet) {
  std::mt19937 random(13);
  int unmasked = 0;
  for (const Isa& isa : isas()) {
    for (int trial = 0; trial < 400; ++trial) {
      test::Bytes memory;
      UnmaskTask task = random_rows(random, 1 << random() % 4, memory);
      test::set_random_output(task, random);
      const test::Bytes want = test::reference_unmask(task);
      test::Bytes got(want.size() + 8, 0xA5);
      task.written = got.data();
      const int64_t rows = task.in.rows();
      isa.kernels->unmask_rows(task, rows / 2, rows);
      isa.kernels->unmask_rows(task, 0, rows / 2);
      for (size_t i = want.size(); i < got.size(); ++i) {
        ASSERT_EQ(got[i], 0xA5) << "written beyond the rows";
      }
      got.resize(want.size());
      ASSERT_EQ(got, want) << isa.name;
      unmasked += isa.kernels->all(task.in, task.is_min, 0, 0, task.in.length) ? 1 : 0;
    }
  }
  EXPECT_GT(unmasked, 50);  // the trials do contain rows to unmask
}

TEST(All, FindsAMissWhereverItIs) {
  for (const Isa& isa : isas()) {
    for (const int32_t size : {1, 2, 4, 8}) {
      for (const int64_t length : {1, 7, 64, 511, 512, 513, 1500}) {
        test::Bytes memory(static_cast<size_t>(length * size));
        for (int64_t i = 0; i < length; ++i) {
          test::put(memory, i, size, 1);
        }
        StridedRows rows{memory.data(), {1, 1, 1}, {0, 0, 0}, length, 1, size};
        ASSERT_TRUE(isa.kernels->all(rows, bits_between(1, 1), 0, 0, length));
        for (const int64_t miss : {int64_t{0}, length / 2, length - 1}) {
          test::put(memory, miss, size, 0);
          ASSERT_FALSE(isa.kernels->all(rows, bits_between(1, 1), 0, 0, length));
          ASSERT_TRUE(isa.kernels->all(rows, bits_between(1, 1), 0, 0, miss));
          ASSERT_TRUE(isa.kernels->all(rows, bits_between(1, 1), 0, miss + 1, length));
          test::put(memory, miss, size, 1);
        }
      }
    }
  }
}

}  // namespace
}  // namespace attn_mask
