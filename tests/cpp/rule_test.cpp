#include "rule/rule.h"

#include <gtest/gtest.h>

#include <limits>
#include <random>

#include "reference.h"

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

TEST(Causal, AttendsToItselfAndTheKeysBefore) {
  for (int64_t position = 0; position < 6; ++position) {
    for (int64_t key = 0; key < 6; ++key) {
      EXPECT_EQ(Causal{}.attends({0, 0, position}, key), key <= position);
    }
  }
}

TEST(SlidingWindow, WidthIsLeftPlusItself) {
  const Rule rule = make_rule(Causal{}) & make_rule(SlidingWindow{3});
  int visible = 0;
  for (int64_t key = 0; key < 20; ++key) {
    visible += attends(rule, {0, 0, 10}, key) ? 1 : 0;
  }
  EXPECT_EQ(visible, 4);
}

TEST(SlidingWindow, LongestWindowDoesNotOverflow) {
  const Rule rule =
      make_rule(Causal{}) & make_rule(SlidingWindow{std::numeric_limits<int64_t>::max()});
  const Interval keys = row_span(rule, {0, 0, 5}, 9).interval;
  EXPECT_EQ(keys.begin, 0);
  EXPECT_EQ(keys.end, 6);
}

TEST(Rule, WithoutLeavesAttendsToEverything) {
  EXPECT_TRUE(attends(make_rule(), {1, 2, 3}, 100));
  const RowSpan row = row_span(make_rule(), {0, 0, 0}, 7);
  EXPECT_EQ(row.interval.begin, 0);
  EXPECT_EQ(row.interval.end, 7);
  EXPECT_EQ(row.unresolved, 0U);
}

TEST(Rule, SpanLevelAgreesWithElementLevel) {
  std::mt19937 random(7);
  for (int trial = 0; trial < 400; ++trial) {
    const int64_t batch_size = 1 + random() % 3;
    const int64_t q_length = 1 + random() % 9;
    const int64_t q_offset = random() % 9;
    const int64_t kv_length = random() % 20;
    const test::RandomPadding padding(random, 1 << random() % 4, batch_size, q_length, kv_length,
                                      1 + random() % 2, random() % 2 == 0);
    Rule rule = make_rule();
    if (random() % 2 == 0) {
      rule = rule & make_rule(Causal{});
    }
    if (random() % 2 == 0) {
      rule = rule & make_rule(SlidingWindow{static_cast<int64_t>(random() % 8)});
    }
    if (random() % 2 == 0) {
      rule = make_rule(padding.leaf) & rule;
    }
    for (int64_t batch = 0; batch < batch_size; ++batch) {
      for (int64_t row = 0; row < q_length; ++row) {
        const Query query{batch, row, q_offset + row};
        const RowSpan span = row_span(rule, query, kv_length);
        ASSERT_LE(0, span.interval.begin);
        ASSERT_LE(span.interval.end, kv_length);
        for (int64_t key = 0; key < kv_length; ++key) {
          ASSERT_EQ(attends(rule, query, key),
                    span.interval.contains(key) && attends(rule, query, key, span.unresolved));
        }
      }
    }
  }
}

}  // namespace
}  // namespace attn_mask
