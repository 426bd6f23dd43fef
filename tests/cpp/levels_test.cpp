// For every kind of node: each level and each kernel gives what the rule's definition gives for
// each element.

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>

#include "cpu/block_mask.h"
#include "cpu/kernels.h"
#include "emulated_grid.h"
#include "format/boolean.h"
#include "reference.h"
#include "rule/hull.h"
#include "rule/prepare.h"
#include "rule/spans.h"

namespace attn_mask {
namespace {

/// 1 for each element that is attended to, [batch_size, heads, q_length, kv_length].
using Elements = std::vector<uint8_t>;

/// `write(query, out)` writes one row.
template <typename Write>
Elements each_row(const Question& question, Write write) {
  Elements out(static_cast<size_t>(question.rows() * question.kv_length), 2);
  for (int64_t plane = 0; plane < question.batch_size * question.heads; ++plane) {
    for (int64_t row = 0; row < question.q_length; ++row) {
      write(question.query(plane, row),
            out.data() + (plane * question.q_length + row) * question.kv_length);
    }
  }
  return out;
}

Elements by_definition(const Question& question) {
  return each_row(question, [&](const Query& query, uint8_t* out) {
    for (int64_t k = 0; k < question.kv_length; ++k) {
      out[k] = attends(question.rule, query, question.key(query.batch, k));
    }
  });
}

/// The spans' result, with the nodes that they leave unresolved evaluated by their definition.
void write_spans(const Question& question, const Query& query, const RowSpans& row, uint8_t* out) {
  for (int64_t k = 0; k < question.kv_length; ++k) {
    out[k] = std::any_of(row.spans.at, row.spans.at + row.spans.size,
                         [&](Interval span) { return span.contains(k); });
    for (int32_t node = 0; node < question.rule.size; ++node) {
      if (((row.unresolved >> node) & 1U) != 0) {
        out[k] &= attends(question.rule, node, query, question.key(query.batch, k));
      }
    }
  }
}

Elements by_spans(const Question& question) {
  return each_row(question, [&](const Query& query, uint8_t* out) {
    write_spans(question, query,
                row_spans(question.rule, query, question.kv_positions, question.kv_length), out);
  });
}

Elements by_runs(const Question& question) {
  int64_t left = 0;
  RowRun run{};
  return each_row(question, [&](const Query& query, uint8_t* out) {
    if (left == 0) {
      run = row_run(question.rule, query, question.q_positions, question.kv_positions,
                    question.kv_length, question.q_length - query.row);
      left = run.rows;
    }
    write_spans(question, query, run.row(run.rows - left--), out);
  });
}

/// By its rows' hulls where they are exact, else by definition within them.
Elements by_hulls(const Question& question) {
  const Hull of_rule(question.rule);
  // As if columns were not listed: keys have positions of their own.
  const WordPlan plan(question.rule, of_rule, Positions{});
  return each_row(question, [&](const Query& query, uint8_t* out) {
    const RowHull hull = row_hull(question.rule, of_rule, plan, query);
    for (int64_t k = 0; k < question.kv_length; ++k) {
      const Key key = question.key(query.batch, k);
      out[k] = hull.positions.contains(key.position) &&
               (hull.exact || attends(question.rule, query, key));
    }
  });
}

/// By the CPU kernels' loops over the leaves of a row.
Elements by_answers(const Question& question) {
  return each_row(question, [&](const Query& query, uint8_t* out) {
    isa_default::kKernels.evaluate(question, query, uint32_t{1} << (question.rule.size - 1),
                                   {0, question.kv_length}, out);
  });
}

/// By words of random lengths.
Elements by_words(const Question& question, std::mt19937& random) {
  const Hull hull(question.rule);
  const WordPlan plan(question.rule, hull, question.kv_positions);
  test::Stacks stacks(1, plan.depth);
  return each_row(question, [&](const Query& query, uint8_t* out) {
    const WordRow row = WordRow::of(question.rule, hull, plan, query, question.kv_positions);
    for (int64_t begin = 0; begin < question.kv_length;) {
      const int64_t end = std::min<int64_t>(begin + 1 + random() % 64, question.kv_length);
      const uint64_t word =
          row_word(question.rule, plan, row, question.kv_positions, {begin, end}, stacks.of(0));
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
Elements by_kernel(const Question& question, Write write) {
  Elements out(static_cast<size_t>(question.rows() * question.kv_length), 2);
  MaskTask task{};
  static_cast<Question&>(task) = question;
  task.format = kBoolean;
  task.out = out.data();
  test::set_contiguous(task);
  write(task);
  return out;
}

Elements by_cpu_kernel(const Question& question) {
  return by_kernel(question, [](const MaskTask& task) {
    isa_default::kKernels.write_tiles(task, {task.kv_length, 1}, 0, task.rows());
  });
}

Elements by_cuda_kernel(const Question& question) {
  return by_kernel(question, [](const MaskTask& task) { test::emulate_write_mask<uint8_t>(task); });
}

void expect_masked_rows(const Question& question) {
  const std::vector<uint8_t> want = test::reference_masked_rows(question);
  std::vector<uint8_t> got(want.size(), 2);
  isa_default::kKernels.find_masked_rows(question, 0, question.rows(), got.data());
  ASSERT_EQ(got, want);
}

std::vector<BlockState> states_of(const BlockMaskTask& task, const Elements& elements) {
  std::vector<BlockState> states;
  for (int64_t line = 0; line < task.planes() * task.q_blocks(); ++line) {
    const Interval rows = task.rows_of(line % task.q_blocks());
    for (int64_t block = 0; block < task.kv_blocks(); ++block) {
      const Interval columns = task.columns_of(block);
      int64_t visible = 0;
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        const auto first =
            elements.begin() + (line / task.q_blocks() * task.q_length + row) * task.kv_length;
        visible += std::count(first + columns.begin, first + columns.end, 1);
      }
      states.push_back(state_of(visible > 0, visible == task.q_block * task.kv_block));
    }
  }
  return states;
}

void expect_block_states(const BlockMaskTask& of, const Elements& elements) {
  BlockMaskTask task = of;
  const std::vector<BlockState> want = states_of(task, elements);
  std::vector<BlockState> got(want.size(), BlockState::kUnknown);
  task.states = got.data();
  find_block_states_cpu(task);
  ASSERT_EQ(got, want);
}

void expect_block_states_on_device(const BlockMaskTask& of, const Elements& elements) {
  BlockMaskTask task = of;
  const std::vector<BlockState> want = states_of(task, elements);
  std::vector<BlockState> got(want.size(), BlockState::kUnknown);
  task.states = got.data();
  test::emulate_block_states(task, 3);
  ASSERT_EQ(got, want);
}

void expect_same_at_all_levels(const Question& question, std::mt19937& random) {
  const Elements want = by_definition(question);
  BlockMaskTask blocks{};
  static_cast<Question&>(blocks) = question;
  blocks.q_block = 1 + random() % 7;
  blocks.kv_block = 1 + random() % 7;
  blocks.stored_heads = blocks.heads;
  // What is prepared is host memory, which CUDA kernels do not have.
  ASSERT_EQ(by_hulls(question), want);
  ASSERT_EQ(by_words(question, random), want);
  ASSERT_EQ(by_cuda_kernel(question), want);
  const test::DevicePrepared on_device(blocks, 1 + random() % 5);
  ASSERT_EQ(by_definition(on_device.task), want);
  ASSERT_EQ(by_hulls(on_device.task), want);
  ASSERT_EQ(by_words(on_device.task, random), want);
  ASSERT_EQ(by_cuda_kernel(on_device.task), want);
  ASSERT_NO_FATAL_FAILURE(expect_block_states_on_device(on_device.task, want));
  ASSERT_NO_FATAL_FAILURE(expect_masked_rows(question));
  ASSERT_NO_FATAL_FAILURE(expect_block_states(blocks, want));
  ASSERT_NO_FATAL_FAILURE(expect_block_states_on_device(blocks, want));
  const PreparedTables prepared(blocks);
  ASSERT_EQ(by_definition(blocks), want);
  ASSERT_EQ(by_spans(blocks), want);
  ASSERT_EQ(by_runs(blocks), want);
  ASSERT_EQ(by_answers(blocks), want);
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
      Question question{};
      question.batch_size = 1 + random() % 2;
      question.heads = 1 + random() % 2;
      question.q_length = 1 + random() % 16;
      question.kv_length = 1 + random() % 40;
      std::vector<int64_t> numbers[2];
      question.q_positions = random_positions(random, numbers[0], question.q_length);
      question.kv_positions = random_positions(random, numbers[1], question.kv_length);
      test::RandomRule made{{}, {}, question.batch_size, question.q_length, question.kv_length};
      const auto sample = made.sample(random, kind);
      if (!sample) {
        ASSERT_GT(number, static_cast<int32_t>(Rule::Kind::kOr));
        return;
      }
      question.rule = *sample;
      if (question.rule.size == 1 && random() % 3 == 0) {
        made.see_at_other_positions(question.rule, random);
      }
      if (random() % 2 == 0) {
        const Rule other = made.leaf(random);
        question.rule = random() % 3 == 0 ? question.rule | other : question.rule & other;
      }
      SCOPED_TRACE("kind " + std::to_string(number) + ", trial " + std::to_string(trial));
      ASSERT_NO_FATAL_FAILURE(expect_same_at_all_levels(question, random));
      const Elements elements = by_definition(question);
      visible += std::count(elements.begin(), elements.end(), 1);
      all += static_cast<int64_t>(elements.size());
    }
    EXPECT_GT(visible, 0);  // the trials do contain both
    EXPECT_LT(visible, all);
  }
}

}  // namespace
}  // namespace attn_mask
