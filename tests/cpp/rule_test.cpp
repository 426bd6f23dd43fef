#include "rule/rule.h"

#include <gtest/gtest.h>

#include <cmath>

#include <functional>
#include <limits>
#include <random>

#include "reference.h"
#include "rule/levels/hull.h"
#include "rule/levels/runs.h"
#include "rule/levels/spans.h"
#include "rule/levels/word.h"

namespace attn_mask {
namespace {

TEST(Interval, IntersectionHoldsTheKeysOfBoth) {
  for (int64_t a = 0; a < 5; ++a) {
    for (int64_t b = 0; b < 5; ++b) {
      for (int64_t c = 0; c < 5; ++c) {
        for (int64_t d = 0; d < 5; ++d) {
          const Interval both = intersect({a, b}, {c, d});
          for (int64_t key = 0; key < 5; ++key) {
            EXPECT_EQ(both.contains(key), a <= key && key < b && c <= key && key < d);
          }
        }
      }
    }
  }
}

TEST(KeyTest, RangeOfBitsInEveryElementSize) {
  const KeyTest test = bits_between(3, 5);
  for (unsigned value = 0; value < 256; ++value) {
    const bool inside = value >= 3 && value <= 5;
    EXPECT_EQ(test(static_cast<uint8_t>(value)), inside) << value;
    EXPECT_EQ(test(static_cast<uint16_t>(value)), inside) << value;
    EXPECT_EQ(test(static_cast<uint32_t>(value)), inside) << value;
    EXPECT_EQ(test(static_cast<uint64_t>(value)), inside) << value;
    EXPECT_FALSE(never()(static_cast<uint8_t>(value))) << value;
  }
  EXPECT_FALSE(test(std::numeric_limits<uint64_t>::max()));
  EXPECT_FALSE(test(uint64_t{4} << 32));
}

TEST(KeyTest, NegativeIntegersWrapAround) {
  const KeyTest minus_two_to_one =
      bits_between(static_cast<uint64_t>(int64_t{-2}), static_cast<uint64_t>(int64_t{1}));
  for (int value = -128; value < 128; ++value) {
    EXPECT_EQ(minus_two_to_one(static_cast<uint8_t>(value)), -2 <= value && value <= 1) << value;
    EXPECT_EQ(minus_two_to_one(static_cast<uint32_t>(value)), -2 <= value && value <= 1) << value;
  }
}

bool attends_at(const Rule& rule, int64_t q, int64_t k) {
  return attends(rule, Query{0, 0, 0, q}, Key{k, k});
}

TEST(Causal, AttendsToItselfAndTheKeysBefore) {
  for (int64_t q = 0; q < 6; ++q) {
    for (int64_t k = 0; k < 6; ++k) {
      EXPECT_EQ(attends_at(make_rule(Causal{}), q, k), k <= q);
    }
  }
}

TEST(SlidingWindow, WidthIsLeftPlusItself) {
  const Rule rule = make_rule(Causal{}) & make_rule(SlidingWindow{3, kOpen});
  int visible = 0;
  for (int64_t k = 0; k < 20; ++k) {
    visible += attends_at(rule, 10, k) ? 1 : 0;
  }
  EXPECT_EQ(visible, 4);
}

TEST(SlidingWindow, BothSides) {
  for (int64_t k = 0; k < 20; ++k) {
    EXPECT_EQ(attends_at(make_rule(SlidingWindow{3, 2}), 10, k), 7 <= k && k <= 12);
  }
}

TEST(SlidingWindow, OpenSidesReachAsFarAsPositionsGo) {
  const int64_t furthest = 3 * kFar;
  for (const int64_t q : {-furthest, int64_t{0}, furthest}) {
    for (const int64_t k : {-furthest, int64_t{0}, furthest}) {
      EXPECT_TRUE(attends_at(make_rule(SlidingWindow{kOpen, kOpen}), q, k));
      EXPECT_EQ(attends_at(make_rule(SlidingWindow{kOpen, 0}), q, k), k <= q);
      EXPECT_EQ(attends_at(make_rule(test::chunk(kOpen)), q, k), (k < 0) == (q < 0));
    }
  }
}

TEST(Chunk, GoesOnBelowItsPadding) {
  const int64_t before[] = {2};
  Chunk chunk = test::chunk(3);
  chunk.padding = {before, 8};
  for (int64_t q = -7; q < 9; ++q) {
    for (int64_t k = -7; k < 9; ++k) {
      const auto number = [](int64_t position) {
        return static_cast<int64_t>(std::floor((static_cast<double>(position) - 2) / 3));
      };
      EXPECT_EQ(attends_at(make_rule(chunk), q, k), number(q) == number(k)) << q << " " << k;
    }
  }
}

TEST(Rule, AllAndNothing) {
  EXPECT_TRUE(attends_at(make_rule(All{}), 3, 100));
  EXPECT_FALSE(attends_at(make_rule(Nothing{}), 3, 3));
  EXPECT_TRUE(attends_at(make_rule(Nothing{}) | make_rule(All{}), 3, 3));
  EXPECT_FALSE(attends_at(make_rule(Nothing{}) & make_rule(All{}), 3, 3));
}

TEST(Rule, SpanLevelAgreesWithElementLevel) {
  std::mt19937 random(7);
  int resolved = 0;
  int rows = 0;
  for (int trial = 0; trial < 3000; ++trial) {
    test::RandomRule made{{},
                          {},
                          static_cast<int64_t>(1 + random() % 2),
                          static_cast<int64_t>(1 + random() % 6),
                          static_cast<int64_t>(random() % 24)};
    MaskParams params{};
    params.rule = made.tree(random, 3);
    params.batch_size = made.batch_size;
    params.heads = random() % 4 == 0 ? 1 : 1000;  // for a small mask tables are not prepared
    params.q_length = made.q_length;
    params.kv_length = made.kv_length;
    params.kv_positions.offset = static_cast<int64_t>(random() % 7) - 3;
    const auto q_offset = static_cast<int64_t>(random() % 20);
    params.q_positions.offset = q_offset;
    const Rule before = params.rule;
    const PreparedRuns prepared(params);
    const Rule& rule = params.rule;
    const Positions& kv_positions = params.kv_positions;
    for (int64_t batch = 0; batch < made.batch_size; ++batch) {
      for (int64_t row = 0; row < made.q_length; ++row) {
        const Query query{batch, 0, row, q_offset + row};
        const RowSpans spans = row_spans(rule, query, kv_positions, made.kv_length);
        const RowHull hull =
            row_hull(rule, Hull(rule), WordPlan(rule, Hull(rule), Positions{}), query);
        ++rows;
        resolved += spans.unresolved == 0 ? 1 : 0;
        for (int32_t i = 0; i < spans.spans.size; ++i) {
          ASSERT_LE(0, spans.spans.at[i].begin);
          ASSERT_LE(spans.spans.at[i].end, made.kv_length);
          ASSERT_FALSE(spans.spans.at[i].empty());
          ASSERT_TRUE(i == 0 || spans.spans.at[i - 1].end <= spans.spans.at[i].begin);
        }
        for (int64_t column = 0; column < made.kv_length; ++column) {
          const Key key{column, kv_positions.at(batch, column)};
          bool attended = false;
          for (int32_t i = 0; i < spans.spans.size; ++i) {
            attended = attended || spans.spans.at[i].contains(column);
          }
          for (int32_t node = 0; node < rule.size; ++node) {
            attended = attended &&
                       (((spans.unresolved >> node) & 1U) == 0 || attends(rule, node, query, key));
          }
          ASSERT_EQ(attended, attends(rule, query, key)) << "trial " << trial;
          ASSERT_EQ(attended, attends(before, query, key)) << "trial " << trial;
          const bool in_hull = hull.positions.contains(key.position);
          ASSERT_TRUE(in_hull || !attends(rule, query, key));
          ASSERT_TRUE(!hull.exact || attends(rule, query, key) == in_hull);
        }
      }
    }
  }
  EXPECT_GT(resolved, rows / 3);  // the trials do contain rows whose spans say it all
}

TEST(Rule, RowRunsAgreeWithTheSpansOfTheirRows) {
  std::mt19937 random(11);
  int64_t runs = 0;
  int64_t rows_seen = 0;
  for (int trial = 0; trial < 3000; ++trial) {
    test::RandomRule made{{},
                          {},
                          static_cast<int64_t>(1 + random() % 2),
                          static_cast<int64_t>(1 + random() % 40),
                          static_cast<int64_t>(random() % 30)};
    Problem problem{};
    problem.rule = made.tree(random, 3);
    problem.batch_size = made.batch_size;
    problem.heads = random() % 4 == 0 ? 1 : 1000;
    problem.q_length = made.q_length;
    problem.kv_length = made.kv_length;
    problem.q_positions.offset = static_cast<int64_t>(random() % 30) - 8;
    problem.kv_positions.offset = static_cast<int64_t>(random() % 9) - 4;
    std::vector<int64_t> listed;
    if (random() % 3 == 0) {
      for (int64_t row = 0; row < made.q_length; ++row) {
        listed.push_back(random() % 4 == 0 ? static_cast<int64_t>(random() % 20)
                                           : (row == 0 ? 0 : listed.back() + 1));
      }
      problem.q_positions.numbers = {listed.data(), 8};
      problem.q_positions.stride = 1;
      problem.q_positions.listed = true;
    }
    const PreparedRuns prepared(problem);
    for (int64_t batch = 0; batch < made.batch_size; ++batch) {
      for (int64_t row = 0; row < made.q_length;) {
        const Query first = problem.query(batch * problem.heads, row);
        const RowRun run = row_run(problem.rule, first, problem.q_positions, problem.kv_positions,
                                   made.kv_length, made.q_length - row);
        ASSERT_LE(1, run.rows);
        ASSERT_LE(row + run.rows, made.q_length);
        ++runs;
        for (int64_t i = 0; i < run.rows; ++i, ++row, ++rows_seen) {
          const Query query = problem.query(batch * problem.heads, row);
          const RowSpans got = run.row(i);
          for (int32_t span = 0; span < got.spans.size; ++span) {
            ASSERT_LE(0, got.spans.at[span].begin);
            ASSERT_LE(got.spans.at[span].end, made.kv_length);
            ASSERT_FALSE(got.spans.at[span].empty()) << "trial " << trial;
            ASSERT_TRUE(span == 0 || got.spans.at[span - 1].end < got.spans.at[span].begin);
          }
          for (int64_t column = 0; column < made.kv_length; ++column) {
            const Key key = problem.key(batch, column);
            bool attended = false;
            for (int32_t span = 0; span < got.spans.size; ++span) {
              attended = attended || got.spans.at[span].contains(column);
            }
            for (int32_t node = 0; node < problem.rule.size; ++node) {
              attended = attended && (((got.unresolved >> node) & 1U) == 0 ||
                                      attends(problem.rule, node, query, key));
            }
            ASSERT_EQ(attended, attends(problem.rule, query, key))
                << "trial " << trial << " row " << row << " column " << column;
          }
        }
      }
    }
  }
  EXPECT_GT(rows_seen, 2 * runs);  // rows are seen together, which is what it is for
}

TEST(Rule, ARowRunLastsAsLongAsItsRowsLookAlike) {
  const Rule window = make_rule(Causal{}) & make_rule(SlidingWindow{9, kOpen});
  // Its window begins at the first key up to row 9, and then moves to the end.
  EXPECT_EQ(row_run(window, {0, 0, 0, 0}, Positions{}, Positions{}, 1000, 1000).rows, 9);
  EXPECT_EQ(row_run(window, {0, 0, 10, 10}, Positions{}, Positions{}, 1000, 900).rows, 900);
  const RowRun chunk =
      row_run(make_rule(test::chunk(100)), {0, 0, 30, 130}, Positions{}, Positions{}, 1000, 900);
  EXPECT_EQ(chunk.rows, 70);
  EXPECT_EQ(chunk.spans.at[0].begin.at, 100);
  EXPECT_EQ(chunk.spans.at[0].end.at, 200);
}

TEST(Prepare, RunsOfManyNumbers) {
  std::mt19937 random(5);
  for (const int32_t width : {0, 1, 2, 4, 8}) {
    for (const int64_t stride : {1, 2}) {
      constexpr int64_t kLength = 300;
      const int64_t size = width == 0 ? 1 : width;
      test::Bytes memory(static_cast<size_t>(kLength * stride * size));
      int64_t value = 0;
      for (int64_t i = 0; i < kLength * stride; ++i) {
        value += random() % 90 == 0 ? 2 : 0;
        test::put(memory, i, static_cast<int32_t>(size), static_cast<uint64_t>(value));
      }
      const Table table{{memory.data(), width}, 0, stride, kLength, {}, {}};
      Problem problem{};
      problem.rule = make_rule(SameId{table, false});
      problem.batch_size = problem.heads = 1;
      problem.q_length = problem.kv_length = kLength;
      const PreparedRuns prepared(problem);
      const Table& found = problem.rule.nodes[0].same_id.ids;
      ASSERT_NE(found.runs.starts, nullptr);
      EXPECT_EQ(found.runs.is_once[0], 1);
      for (int64_t i = 0; i < kLength; ++i) {
        const Interval run = found.runs.around(0, i);
        ASSERT_TRUE(run.contains(i));
        for (int64_t k = 0; k < kLength; ++k) {
          ASSERT_EQ(run.contains(k), table.at(0, k) == table.at(0, i)) << width << " " << i;
        }
      }
    }
  }
}

TEST(Prepare, PositionsInOrderHaveSpans) {
  constexpr int64_t kLength = 100;
  const std::function<int64_t(int64_t)> positions[] = {[](int64_t i) { return kLength - 1 - i; },
                                                       [](int64_t i) { return i / 16; },
                                                       [](int64_t) { return 0; },
                                                       [](int64_t i) { return 2 * i; },
                                                       [](int64_t i) { return i << 40; },
                                                       [](int64_t i) { return -(i / 3 << 20); }};
  for (const auto& position : positions) {
    std::vector<int64_t> table;
    for (int64_t i = 0; i < kLength; ++i) {
      table.push_back(position(i));
    }
    Problem problem{};
    problem.rule = make_rule(Causal{});
    problem.rule.steps[0].table = {{table.data(), 8}, 0, 1, kLength, {}, {}};
    problem.rule.steps_size = 1;
    problem.rule.nodes[0].step_end = 1;
    problem.batch_size = problem.heads = 1;
    problem.q_length = problem.kv_length = kLength;
    const PreparedRuns prepared(problem);
    for (int64_t q = 0; q < kLength; ++q) {
      const RowSpans spans = row_spans(problem.rule, {0, 0, q, q}, Positions{}, kLength);
      ASSERT_EQ(spans.unresolved, 0U);
      ASSERT_EQ(spans.spans.size, 1);
      for (int64_t k = 0; k < kLength; ++k) {
        ASSERT_EQ(spans.spans.at[0].contains(k), table[k] <= table[q]);
      }
    }
  }
}

TEST(Prepare, PackedDocumentsWithPositionsOfTheirOwnHaveSpans) {
  const int64_t ids[] = {0, 0, 0, 1, 1, 2, 2, 2};
  const int64_t positions[] = {0, 1, 2, 0, 1, 0, 1, 2};
  Rule causal = make_rule(Causal{});
  causal.steps[0].table = {{positions, 8}, 0, 1, 8, {}, {}};
  causal.steps_size = 1;
  causal.nodes[0].step_end = 1;
  MaskParams params{};
  params.rule = make_rule(SameId{{{ids, 8}, 0, 1, 8, {}, {}}, false}) & causal;
  params.batch_size = params.heads = 1;
  params.q_length = 64;
  params.kv_length = 8;
  const PreparedRuns prepared(params);
  for (int64_t q = 0; q < 8; ++q) {
    const RowSpans spans = row_spans(params.rule, {0, 0, q, q}, Positions{}, 8);
    ASSERT_EQ(spans.unresolved, 0U);
    ASSERT_EQ(spans.spans.size, 1);
    EXPECT_EQ(spans.spans.at[0].begin, q - positions[q]);
    EXPECT_EQ(spans.spans.at[0].end, q + 1);
  }
}

}  // namespace
}  // namespace attn_mask
