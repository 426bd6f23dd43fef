// For every kind of node: each level and each kernel gives what the rule's definition gives for
// each element.

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>

#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "emulated_grid.h"
#include "format/boolean.h"
#include "reference.h"
#include "rule/levels/hull.h"
#include "rule/levels/runs.h"
#include "rule/levels/spans.h"

namespace attn_mask {
namespace {

/// 1 for each element that is attended to, [batch_size, heads, q_length, kv_length].
using Elements = std::vector<uint8_t>;

/// `write(query, out)` writes one row.
template <typename Write>
Elements each_row(const Problem& problem, Write write) {
  Elements out(static_cast<size_t>(problem.rows() * problem.kv_length), 2);
  for (int64_t plane = 0; plane < problem.batch_size * problem.heads; ++plane) {
    for (int64_t row = 0; row < problem.q_length; ++row) {
      write(problem.query(plane, row),
            out.data() + (plane * problem.q_length + row) * problem.kv_length);
    }
  }
  return out;
}

Elements by_definition(const Problem& problem) {
  return each_row(problem, [&](const Query& query, uint8_t* out) {
    for (int64_t k = 0; k < problem.kv_length; ++k) {
      out[k] = attends(problem.rule, query, problem.key(query.batch, k));
    }
  });
}

/// The spans' result, with the nodes that they leave unresolved evaluated by their definition.
void write_spans(const Problem& problem, const Query& query, const RowSpans& row, uint8_t* out) {
  for (int64_t k = 0; k < problem.kv_length; ++k) {
    out[k] = std::any_of(row.spans.at, row.spans.at + row.spans.size,
                         [&](Interval span) { return span.contains(k); });
    for (int32_t node = 0; node < problem.rule.size; ++node) {
      if (((row.unresolved >> node) & 1U) != 0) {
        out[k] &= attends(problem.rule, node, query, problem.key(query.batch, k));
      }
    }
  }
}

Elements by_spans(const Problem& problem) {
  return each_row(problem, [&](const Query& query, uint8_t* out) {
    write_spans(problem, query,
                row_spans(problem.rule, query, problem.kv_positions, problem.kv_length), out);
  });
}

Elements by_runs(const Problem& problem) {
  int64_t left = 0;
  RowRun run{};
  return each_row(problem, [&](const Query& query, uint8_t* out) {
    if (left == 0) {
      run = row_run(problem.rule, query, problem.q_positions, problem.kv_positions,
                    problem.kv_length, problem.q_length - query.row);
      left = run.rows;
    }
    write_spans(problem, query, run.row(run.rows - left--), out);
  });
}

/// By its rows' hulls where they are exact, else by definition within them.
Elements by_hulls(const Problem& problem) {
  const Hull of_rule(problem.rule);
  // As if columns were not listed: keys have positions of their own.
  const WordPlan plan(problem.rule, of_rule, Positions{});
  return each_row(problem, [&](const Query& query, uint8_t* out) {
    const RowHull hull = row_hull(problem.rule, of_rule, plan, query);
    for (int64_t k = 0; k < problem.kv_length; ++k) {
      const Key key = problem.key(query.batch, k);
      out[k] = hull.positions.contains(key.position) &&
               (hull.exact || attends(problem.rule, query, key));
    }
  });
}

/// By the CPU kernels' loops over the leaves of a row.
Elements by_row_values(const Problem& problem) {
  return each_row(problem, [&](const Query& query, uint8_t* out) {
    isa_default::kKernels.evaluate(problem, query, uint32_t{1} << (problem.rule.size - 1),
                                   {0, problem.kv_length}, out);
  });
}

/// By words of random lengths.
Elements by_words(const Problem& problem, std::mt19937& random) {
  const Hull hull(problem.rule);
  const WordPlan plan(problem.rule, hull, problem.kv_positions);
  test::Stacks stacks(1, plan.depth);
  return each_row(problem, [&](const Query& query, uint8_t* out) {
    const WordRow row = WordRow::of(problem.rule, hull, plan, query, problem.kv_positions);
    const bool are_known = random() % 2 == 0;
    std::vector<Interval> keys;
    for (int32_t step = 0; step < plan.size; ++step) {
      keys.push_back(step_keys(problem.rule, plan, query, step));
    }
    for (int64_t begin = 0; begin < problem.kv_length;) {
      const int64_t end = std::min<int64_t>(begin + 1 + random() % 64, problem.kv_length);
      const uint64_t word =
          row_word(problem.rule, plan, row, problem.kv_positions, {begin, end}, stacks.of(0),
                   [&](int32_t step) {
                     return are_known ? keys[static_cast<size_t>(step)] : no_interval();
                   });
      for (int64_t k = begin; k < begin + 64; ++k) {
        if (k < end) {
          out[k] = word >> (k - begin) & 1U;
        } else {
          ASSERT_EQ(word >> (k - begin) & 1U, 0U);
        }
      }
      begin = end;
    }
  });
}

template <typename Write>
Elements by_kernel(const Problem& problem, Write write) {
  Elements out(static_cast<size_t>(problem.rows() * problem.kv_length), 2);
  MaskParams params{};
  static_cast<Problem&>(params) = problem;
  params.format = kBoolean;
  params.out = out.data();
  test::set_contiguous(params);
  write(params);
  return out;
}

Elements by_cpu_kernel(const Problem& problem) {
  return by_kernel(problem, [](const MaskParams& params) {
    isa_default::kKernels.write_tiles(params, {params.kv_length, 1}, 0, params.rows());
  });
}

Elements by_cuda_kernel(const Problem& problem) {
  return by_kernel(problem,
                   [](const MaskParams& params) { test::emulate_write_mask<uint8_t>(params); });
}

void expect_masked_rows(const Problem& problem) {
  const std::vector<uint8_t> want = test::reference_masked_rows(problem);
  std::vector<uint8_t> got(want.size(), 2);
  isa_default::kKernels.find_masked_rows(problem, 0, problem.rows(), got.data());
  ASSERT_EQ(got, want);
}

std::vector<BlockState> states_of(const BlockMaskParams& params, const Elements& elements) {
  std::vector<BlockState> states;
  for (int64_t line = 0; line < params.planes() * params.q_blocks(); ++line) {
    const Interval rows = params.rows_of(line % params.q_blocks());
    for (int64_t block = 0; block < params.kv_blocks(); ++block) {
      const Interval columns = params.columns_of(block);
      int64_t visible = 0;
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        const auto first = elements.begin() +
                           (line / params.q_blocks() * params.q_length + row) * params.kv_length;
        visible += std::count(first + columns.begin, first + columns.end, 1);
      }
      states.push_back(
          BlockContent{visible > 0, visible == params.q_block * params.kv_block}.state());
    }
  }
  return states;
}

void expect_block_states(const BlockMaskParams& of, const Elements& elements) {
  BlockMaskParams params = of;
  const std::vector<BlockState> want = states_of(params, elements);
  std::vector<BlockState> got(want.size(), BlockState::kUnknown);
  params.states = got.data();
  find_block_states_cpu(params);
  ASSERT_EQ(got, want);
}

void expect_block_states_on_device(const BlockMaskParams& of, const Elements& elements) {
  BlockMaskParams params = of;
  const std::vector<BlockState> want = states_of(params, elements);
  std::vector<BlockState> got(want.size(), BlockState::kUnknown);
  params.states = got.data();
  test::emulate_block_states(params);
  ASSERT_EQ(got, want);
}

void expect_same_at_all_levels(const Problem& problem, std::mt19937& random) {
  const Elements want = by_definition(problem);
  BlockMaskParams blocks{};
  static_cast<Problem&>(blocks) = problem;
  blocks.q_block = random() % 4 == 0 ? 10 : 1 + random() % 7;
  blocks.kv_block = 1 + random() % 7;
  blocks.stored_heads = blocks.heads;
  // What is prepared is host memory, which CUDA kernels do not have.
  ASSERT_EQ(by_hulls(problem), want);
  ASSERT_EQ(by_words(problem, random), want);
  ASSERT_EQ(by_cuda_kernel(problem), want);
  const test::DevicePrepared on_device(blocks);
  ASSERT_EQ(by_definition(on_device.params), want);
  ASSERT_EQ(by_hulls(on_device.params), want);
  ASSERT_EQ(by_words(on_device.params, random), want);
  ASSERT_EQ(by_cuda_kernel(on_device.params), want);
  ASSERT_NO_FATAL_FAILURE(expect_block_states_on_device(on_device.params, want));
  ASSERT_NO_FATAL_FAILURE(expect_masked_rows(problem));
  ASSERT_NO_FATAL_FAILURE(expect_block_states(blocks, want));
  ASSERT_NO_FATAL_FAILURE(expect_block_states_on_device(blocks, want));
  const PreparedRuns prepared(blocks);
  ASSERT_EQ(by_definition(blocks), want);
  ASSERT_EQ(by_spans(blocks), want);
  ASSERT_EQ(by_runs(blocks), want);
  ASSERT_EQ(by_row_values(blocks), want);
  ASSERT_EQ(by_cpu_kernel(blocks), want);
  ASSERT_NO_FATAL_FAILURE(expect_masked_rows(blocks));
  ASSERT_NO_FATAL_FAILURE(expect_block_states(blocks, want));
}

Positions random_positions(std::mt19937& random, std::vector<int64_t>& numbers, int64_t length) {
  Positions positions{};
  positions.offset = static_cast<int64_t>(random() % 20) - 4;
  if (random() % 4 == 0) {
    for (int64_t i = 0; i < length; ++i) {
      numbers.push_back(static_cast<int64_t>(random() % 30) - 2);
    }
    positions = {};
    positions.numbers = {numbers.data(), 8};
    positions.stride = 1;
    positions.listed = true;
  }
  return positions;
}

TEST(Levels, SayTheSameOfEveryKind) {
  std::mt19937 random(41);
  for (int32_t number = 0;; ++number) {
    const auto kind = static_cast<Rule::Kind>(number);
    int64_t visible = 0;
    int64_t all = 0;
    for (int trial = 0; trial < 1000; ++trial) {
      Problem problem{};
      problem.batch_size = 1 + random() % 2;
      problem.heads = 1 + random() % 2;
      problem.q_length = 1 + random() % 16;
      problem.kv_length = 1 + random() % 40;
      std::vector<int64_t> numbers[2];
      problem.q_positions = random_positions(random, numbers[0], problem.q_length);
      problem.kv_positions = random_positions(random, numbers[1], problem.kv_length);
      test::RandomRule made{{}, {}, problem.batch_size, problem.q_length, problem.kv_length};
      const auto sample = made.sample(random, kind);
      if (!sample) {
        ASSERT_GT(number, static_cast<int32_t>(Rule::Kind::kOr));
        return;
      }
      problem.rule = *sample;
      if (problem.rule.size == 1 && random() % 3 == 0) {
        made.see_at_other_positions(problem.rule, random);
      }
      // With a tree on the other side, too, something has to wait for it.
      if (random() % 2 == 0) {
        const Rule other = random() % 3 == 0 ? made.tree(random, 2) : made.leaf(random);
        problem.rule = random() % 3 == 0 ? problem.rule | other : problem.rule & other;
      }
      SCOPED_TRACE("kind " + std::to_string(number) + ", trial " + std::to_string(trial));
      ASSERT_NO_FATAL_FAILURE(expect_same_at_all_levels(problem, random));
      const Elements elements = by_definition(problem);
      visible += std::count(elements.begin(), elements.end(), 1);
      all += static_cast<int64_t>(elements.size());
    }
    EXPECT_GT(visible, 0);  // the trials do contain both
    EXPECT_LT(visible, all);
  }
}

}  // namespace
}  // namespace attn_mask
