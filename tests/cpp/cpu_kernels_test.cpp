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

/// Writes the params with tiles of `keys` keys, in two ranges, into memory with a guard on either
/// side.
void expect_written(const Isa& isa, MaskParams params, int64_t keys, int64_t split) {
  const test::Bytes want = test::reference_mask(params);
  constexpr size_t kGuard = 64;
  test::Bytes memory(want.size() + 2 * kGuard, 0xA5);
  params.out = memory.data() + kGuard;
  const Tiling tiling{keys, (params.kv_length + keys - 1) / keys};
  const int64_t tiles = params.batch_size * params.q_length * tiling.per_row;
  split = tiles == 0 ? 0 : split % tiles;
  isa.kernels->write_tiles(params, tiling, split, tiles);
  isa.kernels->write_tiles(params, tiling, 0, split);
  const test::Bytes got(memory.begin() + kGuard, memory.end() - kGuard);
  ASSERT_EQ(got, want) << isa.name << " b=" << params.batch_size << " q=" << params.q_length
                       << " kv=" << params.kv_length << " size=" << params.format.element_size;
  for (size_t i = 0; i < kGuard; ++i) {
    ASSERT_EQ(memory[i], 0xA5) << "written before the mask";
    ASSERT_EQ(memory[memory.size() - 1 - i], 0xA5) << "written beyond the mask";
  }
}

TEST(WriteTiles, AgreesWithTheRuleOnEveryInstructionSet) {
  std::mt19937 random(11);
  for (const Isa& isa : isas()) {
    for (int trial = 0; trial < 600; ++trial) {
      MaskParams params{};
      params.batch_size = 1 + random() % 3;
      params.heads = 1;
      params.q_length = 1 + random() % 6;
      params.kv_length = 1 + random() % 150;
      params.q_positions.offset = random() % 120;
      params.format = kFormats[random() % 4];
      const test::RandomPadding padding(random, 1 << random() % 4, params.batch_size,
                                        params.q_length, params.kv_length, 1 + random() % 2,
                                        random() % 2 == 0);
      const test::RandomPadding more(random, 1 << random() % 4, params.batch_size, params.q_length,
                                     params.kv_length, 1, false);
      params.rule = make_rule(All{});
      if (random() % 2 == 0) {
        params.rule = params.rule & make_rule(Causal{});
      }
      if (random() % 2 == 0) {
        params.rule =
            params.rule & make_rule(SlidingWindow{static_cast<int64_t>(random() % 50), kOpen});
      }
      if (random() % 4 != 0) {
        params.rule = params.rule & make_rule(padding.leaf);
      }
      if (random() % 4 == 0) {  // two leaves that are evaluated key by key
        params.rule = params.rule & make_rule(more.leaf);
      }
      test::set_contiguous(params);
      if (random() % 3 == 0) {
        test::set_random_strides(params, random);
      }
      expect_written(isa, params, 1 + static_cast<int64_t>(random() % 80), random());
    }
  }
}

TEST(WriteTiles, UnmasksRowsWithoutAKey) {
  std::mt19937 random(14);
  for (const Isa& isa : isas()) {
    for (int trial = 0; trial < 200; ++trial) {
      MaskParams params{};
      params.batch_size = 1 + random() % 3;
      params.heads = 1;
      params.q_length = 1 + random() % 9;
      params.kv_length = params.q_length + static_cast<int64_t>(random() % 40);
      params.q_positions.offset = params.kv_length - params.q_length;
      params.format = kFormats[random() % 4];
      test::RandomPadding padding(random, 1 << random() % 4, params.batch_size, params.q_length,
                                  params.kv_length, 1 + random() % 2, false);
      if (random() % 2 == 0) {  // much of it
        padding.leaf.visible = bits_between(3, 3);
      }
      params.rule = make_rule(Causal{}) & make_rule(padding.leaf);
      if (random() % 2 == 0) {
        params.rule =
            params.rule & make_rule(SlidingWindow{static_cast<int64_t>(random() % 6), kOpen});
      }
      if (random() % 2 == 0) {  // a tree, not all of whose rows are their hull
        params.rule = params.rule | (make_rule(SlidingWindow{0, 0}) & make_rule(padding.leaf));
      }
      const std::vector<uint8_t> want = test::reference_masked_rows(params);
      std::vector<uint8_t> rows(want.size(), 2);
      isa.kernels->find_masked_rows(params, 0, params.rows(), rows.data());
      ASSERT_EQ(rows, want) << isa.name;
      params.unmasking = {rows.data(), 0x5A, true};
      test::set_contiguous(params);
      expect_written(isa, params, 1 + static_cast<int64_t>(random() % 20), random());
    }
  }
}

TEST(WriteTiles, RowsLongerThanATile) {
  std::mt19937 random(12);
  for (const Isa& isa : isas()) {
    for (const DenseFormat& format : kFormats) {
      const int64_t keys = kTileBytes / format.element_size;
      for (const int64_t kv_length : {keys - 1, keys, keys + 1, 2 * keys + 17}) {
        MaskParams params{};
        params.batch_size = 2;
        params.heads = 1;
        params.q_length = 3;
        params.kv_length = kv_length;
        params.q_positions.offset = kv_length - 3;
        params.format = format;
        const test::RandomPadding padding(random, 8, 2, 3, kv_length, 1, false);
        params.rule =
            make_rule(Causal{}) & make_rule(SlidingWindow{keys, kOpen}) & make_rule(padding.leaf);
        test::set_contiguous(params);
        expect_written(isa, params, keys, 5);
        params.out_strides[3] = 2;
        params.out_strides[2] = 2 * kv_length;
        params.out_strides[0] = params.q_length * params.out_strides[2];
        expect_written(isa, params, keys, 5);
      }
    }
  }
}

UnmaskParams random_rows(std::mt19937& random, int32_t size, test::Bytes& memory) {
  UnmaskParams params{};
  params.in.element_size = size;
  params.in.length = random() % 40;
  params.in.stride = 1 + random() % 2;
  const int64_t row = params.in.length * params.in.stride;
  for (auto& extent : params.in.sizes) {
    extent = 1 + random() % 3;
  }
  params.in.strides[2] = random() % 4 == 0 ? 0 : row;
  params.in.strides[1] = random() % 4 == 0 ? 0 : params.in.sizes[2] * row;
  params.in.strides[0] = params.in.sizes[1] * params.in.sizes[2] * row;
  const int64_t elements = params.in.sizes[0] * params.in.strides[0] + 1;
  memory.assign(static_cast<size_t>(elements * size), 0);
  const uint64_t sign = uint64_t{1} << (8 * size - 1);
  const uint64_t minimum = sign | 0x7B;
  const bool mostly_minimum = random() % 2 == 0;
  for (int64_t i = 0; i < elements; ++i) {
    test::put(memory, i, size, mostly_minimum && random() % 40 != 0 ? minimum : random());
  }
  params.in.data = memory.data();
  params.is_min = bits_between(minimum, minimum);
  params.sign = random() % 4 == 0 ? 0 : sign;
  return params;
}

TEST(UnmaskRows, AgreesWithTheReferenceOnEveryInstructionSet) {
  std::mt19937 random(13);
  int unmasked = 0;
  for (const Isa& isa : isas()) {
    for (int trial = 0; trial < 400; ++trial) {
      test::Bytes memory;
      UnmaskParams params = random_rows(random, 1 << random() % 4, memory);
      test::set_random_output(params, random);
      const test::Bytes want = test::reference_unmask(params);
      test::Bytes got(want.size() + 8, 0xA5);
      params.written = got.data();
      const int64_t rows = params.in.rows();
      isa.kernels->unmask_rows(params, rows / 2, rows);
      isa.kernels->unmask_rows(params, 0, rows / 2);
      for (size_t i = want.size(); i < got.size(); ++i) {
        ASSERT_EQ(got[i], 0xA5) << "written beyond the rows";
      }
      got.resize(want.size());
      ASSERT_EQ(got, want) << isa.name;
      unmasked += isa.kernels->all(params.in, params.is_min, 0, 0, params.in.length) ? 1 : 0;
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
