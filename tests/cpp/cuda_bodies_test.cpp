// Runs what each CUDA thread does for every block and thread of a grid, on the host, and compares
// with the CPU kernels bit for bit.

#include <gtest/gtest.h>

#include <array>
#include <map>
#include <random>

#include "bits.h"
#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "emulated_grid.h"
#include "format/additive.h"
#include "format/boolean.h"
#include "reference.h"
#include "rule/levels/runs.h"

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
void expect_mask(MaskParams params) {
  test::Bytes want(static_cast<size_t>(test::reach(params)) * sizeof(T), 0xA5);
  params.out = want.data();
  isa_default::kKernels.write_tiles(params, {params.kv_length, 1}, 0, params.rows());
  // Outputs of a user's may begin at any element.
  for (const int64_t offset : {0, 1, 3}) {
    DeviceMemory got(want.size() + static_cast<size_t>(offset) * sizeof(T));
    params.out = got.data() + offset * static_cast<int64_t>(sizeof(T));
    test::emulate_write_mask<T>(test::DevicePrepared(params).params);
    const test::Bytes all = got.contents();
    ASSERT_EQ(test::Bytes(all.begin() + offset * static_cast<int64_t>(sizeof(T)), all.end()), want)
        << "b=" << params.batch_size << " q=" << params.q_length << " kv=" << params.kv_length
        << " element " << sizeof(T);
    ASSERT_TRUE(got.guard_intact()) << "written after the mask";
  }
}

void expect_mask(const MaskParams& params) {
  with_bits(params.format.element_size, [&](auto bits) { expect_mask<decltype(bits)>(params); });
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
        MaskParams params{};
        params.batch_size = 1 + random() % 3;
        params.heads = 1 + random() % 2;
        params.q_length = 1 + random() % 5;
        params.kv_length = kv_length;
        params.q_positions.offset = random() % 40;
        params.format = format;
        const test::RandomPadding padding(random, 1 << random() % 4, params.batch_size,
                                          params.q_length, kv_length, 1 + random() % 2,
                                          random() % 2 == 0);
        params.rule = make_rule(Causal{});
        if (random() % 2 == 0) {
          params.rule =
              params.rule & make_rule(SlidingWindow{static_cast<int64_t>(random() % 30), kOpen});
        }
        if (random() % 2 == 0) {
          params.rule = params.rule & make_rule(padding.leaf);
        }
        std::vector<uint8_t> masked_rows;
        if (random() % 3 == 0) {
          masked_rows = test::reference_masked_rows(params);
          params.unmasking = {masked_rows.data(), 0x5A, true};
          unmasked += std::count(masked_rows.begin(), masked_rows.end(), 1);
        }
        test::set_contiguous(params);
        if (random() % 2 == 0) {
          test::set_random_strides(params, random);
        }
        expect_mask(params);
      }
    }
  }
  EXPECT_GT(unmasked, 20);  // the trials do contain rows without a key
}

/// What the kernel writes into groups of one row that hold `columns`, in the memory of just these.
template <typename T>
std::vector<T> written(MaskParams params, int64_t row, Interval columns) {
  std::vector<T> memory(static_cast<size_t>(columns.end - columns.begin));
  const int64_t plane = row / params.q_length;
  const int64_t first =
      params.out_offset({plane / params.heads, plane % params.heads, row % params.q_length, 0}) +
      columns.begin;
  // Where the whole mask would begin.
  params.out = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(memory.data()) -
                                       static_cast<uintptr_t>(first) * sizeof(T));
  const MaskLaunch launch = mask_launch<T>(params);
  test::Stacks stacks(kLanes, launch.plan.depth);
  const RowWriter<T> writer(launch, row);
  Interval keys[Rule::kMaxNodes];
  for (int64_t step = 0; step < launch.plan.size; ++step) {
    keys[step] = writer.keys_body(step);
  }
  const int64_t width = kLanes * lane_width<T>(launch.by_words);
  for (int64_t group = columns.begin / width; group * width < columns.end; ++group) {
    uint64_t words[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      words[lane] = writer.word(group, lane, keys, stacks.of(lane));
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      if (launch.by_words) {
        writer.write_packs(group, lane, words);
      } else {
        writer.write_pack(group * kLanes + lane, static_cast<uint32_t>(words[lane]));
      }
    }
  }
  return memory;
}

template <typename T>
void expect_written(const MaskParams& params, int64_t row, Interval columns) {
  const std::vector<T> got = written<T>(params, row, columns);
  const int64_t plane = row / params.q_length;
  const Query query = params.query(plane, row % params.q_length);
  int64_t visible = 0;
  for (int64_t column = columns.begin; column < columns.end; ++column) {
    const bool wanted = attends(params.rule, query, params.key(query.batch, column));
    visible += wanted ? 1 : 0;
    ASSERT_EQ(got[static_cast<size_t>(column - columns.begin)],
              static_cast<T>(wanted ? params.format.attend : params.format.masked))
        << "row " << row << ", column " << column;
  }
  EXPECT_GT(visible, 0);
  EXPECT_LT(visible, columns.end - columns.begin);
}

TEST(WriteMaskBody, CountsRowsKeysAndElementsIn64Bits) {
  constexpr int64_t kLarge = int64_t{1} << 33;
  MaskParams params{};
  params.heads = 2;
  params.format = kAdditiveBFloat16;
  const Rule near = make_rule(Causal{}) & make_rule(SlidingWindow{30, kOpen});
  for (const Rule& rule : {near, near | make_rule(Chunk{7, Divisor(7), {}, 0})}) {
    params.rule = rule;
    // Rows: planes of 2^33 and more, all of them in the same memory.
    params.batch_size = 3;
    params.q_length = kLarge + 3;
    params.kv_length = 70;
    params.kv_positions.offset = kLarge - 40;
    std::fill_n(params.out_strides, 3, 0);
    params.out_strides[3] = 1;
    for (const int64_t row : {kLarge - 5, kLarge + 2}) {
      for (const int64_t plane : {0, 5}) {
        expect_written<uint16_t>(params, plane * params.q_length + row, {0, 70});
      }
    }
    // Strides: the third row of the sixth plane begins after 2^37 elements.
    params.q_length = 3;
    params.q_positions.offset = kLarge;
    params.out_strides[0] = 3 * (kLarge + 1);
    params.out_strides[1] = kLarge + 1;
    params.out_strides[2] = kLarge / 2 - 1;
    expect_written<uint16_t>(params, 5 * 3 + 2, {0, 70});
    // Keys: the columns of some groups in a row of 2^33.
    params.kv_length = kLarge + 5;
    params.kv_positions.offset = 0;
    params.out_strides[2] = 1;
    expect_written<uint16_t>(params, 5 * 3 + 2, {kLarge - 2048, kLarge + 5});
    params.q_positions.offset = kLarge / 2 + 77;
    expect_written<uint16_t>(params, 1, {kLarge / 2, kLarge / 2 + 2048});
    params.q_positions.offset = 0;
  }
}

template <typename T>
void expect_unmask(UnmaskParams params, int64_t threads) {
  const test::Bytes want = test::reference_unmask(params);
  for (const int64_t offset : {0, 1, 3}) {
    const auto before = static_cast<size_t>(offset) * sizeof(T);
    DeviceMemory got(want.size() + before);
    params.written = got.data() + before;
    for (int64_t index = 0; index < params.in.rows(); ++index) {
      const UnmaskRow<T> row(params, index);
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
    UnmaskParams params{};
    params.in.element_size = 2 << random() % 3;
    params.in.length = 1 + random() % 30;
    params.in.stride = 1 + random() % 2;
    params.in.sizes[0] = 1 + random() % 2;
    params.in.sizes[1] = 1 + random() % 2;
    params.in.sizes[2] = 1 + random() % 4;
    params.in.strides[2] = params.in.length * params.in.stride;
    params.in.strides[1] = random() % 3 == 0 ? 0 : params.in.sizes[2] * params.in.strides[2];
    params.in.strides[0] = params.in.sizes[1] * params.in.sizes[2] * params.in.strides[2];
    const int64_t elements = params.in.sizes[0] * params.in.strides[0];
    const uint64_t sign = uint64_t{1} << (8 * params.in.element_size - 1);
    test::Bytes memory(static_cast<size_t>(elements * params.in.element_size));
    for (int64_t i = 0; i < elements; ++i) {
      test::put(memory, i, params.in.element_size, random() % 20 != 0 ? sign | 0x7B : 0);
    }
    params.in.data = memory.data();
    params.is_min = bits_between(sign | 0x7B, sign | 0x7B);
    params.sign = sign;
    test::set_random_output(params, random);
    const int64_t threads = 1 + random() % 40;
    with_bits(params.in.element_size,
              [&](auto bits) { expect_unmask<decltype(bits)>(params, threads); });
  }
}

/// What the prepare step leaves of a table, found element by element.
void expect_bounds(const TableJob& job) {
  for (int64_t row = 0; row < job.rows; ++row) {
    const auto number = [&](int64_t i) { return job.table.at(row, i); };
    const bool is_affine = job.kind == TableJob::Kind::kAffine;
    const auto goes_on = [&](int64_t i) {
      return is_affine ? number(i) == number(i - 1) + 1
                       : number(i) == number(i - 1) ||
                             (job.negative_is_none && std::max(number(i), number(i - 1)) < 0);
    };
    std::map<int64_t, int64_t> runs_of;
    bool ascending = true;
    int64_t last = -1;
    for (int64_t begin = 0, end = 0; begin < job.length; begin = end) {
      for (end = begin + 1; end < job.length && goes_on(end); ++end) {
      }
      const int64_t id = number(begin);
      const bool of_none = job.negative_is_none && id < 0;
      ++runs_of[std::max<int64_t>(id, -1)];
      ascending = ascending && (id < 0 || last < id);
      last = id < 0 ? last : id;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t index = row * job.length + i;
        ASSERT_EQ(job.begin[index], of_none ? i : begin) << row << " " << i;
        ASSERT_EQ(job.end[index], of_none ? i : end) << row << " " << i;
      }
    }
    const bool is_once = ascending && (job.negative_is_none || runs_of[-1] <= 1);
    ASSERT_EQ(job.repeats[row] <= 1, is_affine || is_once) << row;
  }
}

TEST(PrepareBodies, FindRunsInRowsOfSeveralParts) {
  std::mt19937 random(23);
  int64_t once = 0;
  for (int trial = 0; trial < 120; ++trial) {
    const int64_t length = trial == 0   ? 0
                           : trial == 1 ? 70000
                                        : static_cast<int64_t>(1 + random() % 9000);
    const int64_t stride = 1 + random() % 2;
    const int64_t rows = 1 + random() % 2;
    const int32_t width = std::array{0, 1, 2, 4, 8}[random() % 5];
    const auto size = static_cast<int32_t>(width == 0 ? 1 : width);
    const auto longest = uint64_t{1} << random() % 16;
    // Mostly as documents and images have them; else descending, repeating or by chance.
    const auto way = random() % 6;
    test::Bytes memory(static_cast<size_t>((rows * length * stride + 1) * size));
    for (int64_t row = 0; row < rows; ++row) {
      int64_t id = way == 1 ? 100 : 0;
      for (int64_t i = 0, end = 0; i < length; ++i) {
        const bool begins = i == end;
        if (begins) {
          end = i + 1 + static_cast<int64_t>(random() % longest);
          id += way == 1 ? -1 : 1;
        }
        const bool negative = way == 2 ? i / 50 % 2 == 1 : way == 3 && i < length / 3;
        const int64_t value = negative   ? (way == 2 && begins ? -2 : -1)
                              : way == 4 ? static_cast<int64_t>(random() % 3) - 1
                              : way == 5 ? id % 5
                                         : id;
        test::put(memory, (row * length + i) * stride, size, static_cast<uint64_t>(value));
      }
    }
    Table table{{memory.data(), width}, rows == 1 ? 0 : length * stride, stride, length, {}, {}};
    Problem problem{};
    problem.batch_size = rows;
    problem.heads = 1;
    problem.q_length = problem.kv_length = std::max<int64_t>(8, length);
    problem.rule = make_rule(SameId{table, random() % 2 == 0});
    Rule moved = make_rule(Causal{});
    moved.steps[0].table = table;
    moved.steps_size = 1;
    moved.nodes[0].step_end = 1;
    problem.rule = problem.rule & moved;
    std::vector<uint64_t> prepared;
    const DeviceTables tables(problem, [&](size_t bytes) {
      prepared.assign(bytes / 8 + 1, 0xA5A5A5A5A5A5A5A5U);
      return static_cast<void*>(prepared.data());
    });
    ASSERT_EQ(tables.size, 2);
    test::emulate_prepare(tables);
    for (const TableJob& job : {tables.jobs[0], tables.jobs[1]}) {
      SCOPED_TRACE("trial " + std::to_string(trial));
      ASSERT_NO_FATAL_FAILURE(expect_bounds(job));
      once += job.kind == TableJob::Kind::kSame && job.repeats[0] <= 1;
    }
  }
  EXPECT_GT(once, 20);
  EXPECT_LT(once, 100);
}

TEST(Grid, BlocksOfARowAreWholeWarps) {
  EXPECT_EQ(threads_for_row(0), 32);
  EXPECT_EQ(threads_for_row(1), 32);
  EXPECT_EQ(threads_for_row(33), 64);
  EXPECT_EQ(threads_for_row(100000), kThreadsPerBlock);
}

/// A block mask's numbers, in the order of the parameters' lists.
struct BlockMaskNumbers {
  std::vector<int32_t> memory[2][2][2];  // keys or queries; partial or full; counts and indices

  explicit BlockMaskNumbers(BlockMaskParams& params) {
    const int64_t stored = params.batch_size * params.stored_heads;
    for (size_t kind = 0; kind < 2; ++kind) {
      params.kv[kind] = lists(0, kind, stored * params.q_blocks(), params.kv_width);
      params.q[kind] = lists(1, kind, stored * params.kv_blocks(), params.q_width);
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

TEST(BlockMaskBodies, AgreeWithTheCpuKernel) {
  std::mt19937 random(31);
  for (int trial = 0; trial < 400; ++trial) {
    // Of the larger ones a line has more blocks than a warp has lanes, and a block several words.
    const int64_t scale = trial % 8 == 0 ? 16 : 1;
    BlockMaskParams params{};
    params.batch_size = 1 + random() % 2;
    params.heads = 1 + random() % 2;
    params.stored_heads = params.heads + random() % 2;
    params.q_length = 1 + random() % (39 * scale);
    params.kv_length = 1 + random() % (39 * scale);
    params.q_block = 1 + random() % (9 * scale);
    params.kv_block = 1 + random() % (9 * scale);
    params.separate_full = random() % 4 != 0;
    params.q_positions.offset = random() % 20;
    params.kv_positions.offset = random() % 9;
    const test::RandomPadding padding(random, 1 << random() % 4, params.batch_size,
                                      params.q_length + 1, params.kv_length + 9, 1 + random() % 2,
                                      random() % 2 == 0);
    const int64_t positions = 80 * scale;
    std::vector<int64_t> ids(static_cast<size_t>(positions));
    std::vector<int64_t> images(ids.size());
    const int64_t text = 1 + random() % (20 * scale);
    for (int64_t i = 0; i < positions; ++i) {
      const auto place = static_cast<size_t>(i);
      ids[place] = i == 0 ? 0 : ids[place - 1] + (random() % (9 * scale) == 0 ? 1 : 0);
      images[place] =
          i % (2 * text) < text ? -1 - static_cast<int64_t>(random() % 2) : i / (2 * text);
    }
    const auto same = [&](const std::vector<int64_t>& numbers, bool negative_is_none) {
      return make_rule(SameId{{{numbers.data(), 8}, 0, 1, positions, {}, {}}, negative_is_none});
    };
    const Rule leaves[] = {
        make_rule(Causal{}),
        make_rule(SlidingWindow{static_cast<int64_t>(random() % (20 * scale)), 3}),
        make_rule(test::chunk(static_cast<int64_t>(1 + random() % (20 * scale)))),
        same(ids, false),
        same(images, true),
        make_rule(padding.leaf)};
    params.rule = leaves[random() % 6];
    for (int more = random() % 3; more > 0; --more) {
      const Rule& leaf = leaves[random() % 6];
      params.rule = random() % 3 == 0 ? params.rule | leaf : params.rule & leaf;
    }
    const auto narrower = [&](int64_t blocks) {
      return random() % 3 == 0 ? static_cast<int64_t>(random() % (blocks + 1)) : blocks;
    };
    params.kv_width = narrower(params.kv_blocks());
    params.q_width = narrower(params.q_blocks());

    BlockMaskParams on_host = params;
    BlockMaskNumbers want(on_host);
    const PreparedRuns prepared(on_host);
    const auto longest = write_block_mask_cpu(on_host);
    std::vector<BlockState> host_states(
        static_cast<size_t>(params.planes() * params.q_blocks() * params.kv_blocks()));
    on_host.states = host_states.data();
    find_block_states_cpu(on_host);

    std::vector<BlockState> states(host_states.size(), BlockState::kUnknown);
    params.states = states.data();
    BlockMaskNumbers got(params);
    test::emulate_block_states(params);
    ASSERT_EQ(states, host_states) << "trial " << trial;
    states.assign(states.size(), BlockState::kUnknown);
    test::emulate_block_states(test::DevicePrepared(params).params);
    ASSERT_EQ(states, host_states) << "trial " << trial << ", prepared";
    const bool fits = test::emulate_block_lists(params);
    EXPECT_EQ(fits, longest->kv <= params.kv_width && longest->q <= params.q_width);
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

/// What is found of documents, and their borders with a guard after them.
struct Documents {
  FoundDocuments found{-1, -1, -1, -1};
  std::vector<int32_t> borders;

  Documents(const DocumentParams& params, void (*find)(const DocumentParams&))
      : borders(static_cast<size_t>(params.max_documents + 2), -7) {
    DocumentParams given = params;
    given.borders = borders.data();
    given.found = &found;
    find(given);
    FoundDocuments alone{};
    given.borders = nullptr;
    given.found = &alone;
    find(given);
    EXPECT_EQ(std::memcmp(&alone, &found, sizeof(found)), 0);
  }
};

TEST(DocumentBodies, FindBordersOfRowsOfAnyLength) {
  std::mt19937 random(26);
  int64_t exceeded = 0;
  int64_t fallen = 0;
  for (int trial = 0; trial < 200; ++trial) {
    const int64_t length = trial == 0   ? 3 * kTokensOfChunk + 1
                           : trial == 1 ? kTokensOfChunk
                           : trial == 2
                               ? 1
                               : static_cast<int64_t>(1 + random() % (1U << random() % 14));
    const int64_t rows = trial < 3 ? 1 : 1 + random() % 4;
    const bool shared = random() % 3 == 0;  // one row of ids for all
    const int64_t stride = 1 + random() % 2;
    const int32_t width = std::array{0, 1, 2, 4, 8}[random() % 5];
    const auto size = static_cast<int32_t>(width == 0 ? 1 : width);
    const uint64_t longest_run = uint64_t{1} << random() % 15;
    const auto way = random() % 5;  // up, one document, each token one, down from below 0, chance
    test::Bytes memory(static_cast<size_t>(rows * length * stride * size));
    for (int64_t row = 0; row < rows; ++row) {
      int64_t id = way == 3 ? -1 : -3;
      for (int64_t i = 0, end = 0; i < length; ++i) {
        if (i == end || way == 2) {
          end = i + 1 + static_cast<int64_t>(random() % longest_run);
          id += way == 1   ? 0
                : way == 3 ? -1
                : way == 4 ? static_cast<int64_t>(random() % 3) - 1
                           : 1;
        }
        test::put(memory, (row * length + i) * stride, size, static_cast<uint64_t>(id));
      }
    }
    const Table ids{{memory.data(), width}, shared ? 0 : length * stride, stride, length, {}, {}};
    std::vector<int32_t> want;
    int64_t longest = 0;
    bool rise = true;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < length; ++i) {
        if (i == 0 || ids.at(row, i) != ids.at(row, i - 1)) {
          want.push_back(static_cast<int32_t>(row * length + i));
        }
        rise = rise && (i == 0 || ids.at(row, i) >= ids.at(row, i - 1));
        longest = std::max(longest, row * length + i + 1 - want.back());
      }
    }
    const auto count = static_cast<int64_t>(want.size());
    DocumentParams params{ids, rows, 0, 0, nullptr, nullptr};
    params.max_documents = random() % 3 == 0 ? count : 1 + random() % (2 * count);
    params.max_length = random() % 3 == 0 ? longest : 1 + random() % (2 * longest);
    const bool fit = count <= params.max_documents && longest <= params.max_length;
    want.resize(static_cast<size_t>(params.max_documents + 1), static_cast<int32_t>(rows * length));
    want.push_back(-7);
    for (auto* const find : {&test::emulate_find_documents, &find_documents_cpu}) {
      const Documents got(params, find);
      EXPECT_EQ(got.found.count, count) << trial;
      EXPECT_EQ(got.found.longest, longest) << trial;
      EXPECT_EQ(got.found.rise, rise ? 1 : 0) << trial;
      EXPECT_EQ(got.found.fit, fit ? 1 : 0) << trial;
      ASSERT_EQ(got.borders, want) << trial;
    }
    exceeded += fit ? 0 : 1;
    fallen += rise ? 0 : 1;
  }
  EXPECT_TRUE(20 < exceeded && exceeded < 180);
  EXPECT_TRUE(20 < fallen && fallen < 180);
}

}  // namespace
}  // namespace attn_mask
