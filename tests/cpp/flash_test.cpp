// What is handed to the flash kernels of GPUs says all of a rule: no part of it is lost.

#include "attention/flash.h"

#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

namespace attn_mask {
namespace {

constexpr int64_t kLength = 8;
constexpr std::array<int64_t, kLength> kIds{0, 0, 0, 1, 1, -2, -2, -2};
constexpr std::array<uint8_t, kLength> kMask{1, 1, 1, 0, 1, 1, 1, 1};

Table ids() { return {{kIds.data(), 8}, 0, 1, kLength, {}, {}}; }

Padding padding() {
  Padding leaf{};
  leaf.mask = kMask.data();
  leaf.key_stride = 1;
  leaf.length = kLength;
  leaf.element_size = 1;
  leaf.visible = bits_between(1, 255);
  return leaf;
}

const std::array<Leaf, 8> kLeaves{Leaf(All{}),
                                  Leaf(Nothing{}),
                                  Leaf(Causal{}),
                                  Leaf(SlidingWindow{2, kOpen}),
                                  Leaf(SlidingWindow{3, 1}),
                                  Leaf(Chunk{3, Divisor(3), {}, 0}),
                                  Leaf(SameId{ids(), /*negative_is_none=*/false}),
                                  Leaf(SameId{ids(), /*negative_is_none=*/true})};

Problem problem_of(const std::vector<Leaf>& leaves, int64_t q_length = kLength) {
  Problem problem{};
  for (const Leaf& leaf : leaves) {
    narrow(problem.rule, leaf);
  }
  problem.batch_size = problem.heads = 1;
  problem.q_length = q_length;
  problem.kv_length = kLength;
  problem.q_positions.offset = kLength - q_length;
  return problem;
}

/// What such a kernel shows.
bool shows(const attention::FlashBand& band, int64_t q, int64_t k) {
  return (band.left < 0 || k >= q - band.left) && (band.right < 0 || k <= q + band.right) &&
         (band.documents == nullptr ||
          kIds.at(static_cast<size_t>(q)) == kIds.at(static_cast<size_t>(k)));
}

/// Whether there is a band; it must then show what the rule shows.
bool has_band(const Problem& problem) {
  const auto band = attention::flash_band(problem);
  for (int64_t row = 0; band && row < problem.q_length; ++row) {
    const Query query = problem.query(0, row);
    for (int64_t k = 0; k < kLength; ++k) {
      EXPECT_EQ(shows(*band, query.position, k), attends(problem.rule, query, problem.key(0, k)));
    }
  }
  return band.has_value();
}

TEST(Flash, SaysAllOfARule) {
  for (const Leaf& a : kLeaves) {
    for (const Leaf& b : kLeaves) {
      for (const Leaf& c : kLeaves) {
        has_band(problem_of({a, b, c}));
        has_band(problem_of({a, b, c}, 3));
      }
    }
  }
}

TEST(Flash, TakesWindowsAndDocuments) {
  const SameId documents{ids(), /*negative_is_none=*/false};
  EXPECT_TRUE(has_band(problem_of({Causal{}})));
  EXPECT_TRUE(has_band(problem_of({Causal{}}, 3)));
  EXPECT_TRUE(has_band(problem_of({Causal{}, SlidingWindow{2, kOpen}}, 1)));
  EXPECT_TRUE(has_band(problem_of({SlidingWindow{3, 1}})));
  EXPECT_TRUE(has_band(problem_of({documents})));
  EXPECT_TRUE(has_band(problem_of({Causal{}, documents, SlidingWindow{2, kOpen}})));
}

TEST(Flash, RefusesWhatItCannotSay) {
  const SameId documents{ids(), /*negative_is_none=*/false};
  EXPECT_FALSE(has_band(problem_of({Causal{}, padding()})));
  EXPECT_FALSE(has_band(problem_of({Causal{}, Chunk{3, Divisor(3), {}, 0}})));
  EXPECT_FALSE(has_band(problem_of({SameId{ids(), /*negative_is_none=*/true}})));
  EXPECT_FALSE(has_band(problem_of({documents, documents})));
  EXPECT_FALSE(has_band(problem_of({Causal{}, documents}, 3)));  // not of all tokens
  EXPECT_FALSE(has_band(problem_of({Nothing{}})));
  // Queries after or before the keys.
  Problem later = problem_of({SlidingWindow{0, 0}});
  later.q_positions.offset = 4;
  EXPECT_FALSE(has_band(later));
  // Another rule may be visible where the first is not.
  Problem either = problem_of({Causal{}, SlidingWindow{3, 1}});
  either.rule.nodes[2].kind = Rule::Kind::kOr;
  for (int32_t i = 0; i < 3; ++i) {
    either.rule.nodes[i].conjunct = false;
  }
  EXPECT_FALSE(has_band(either));
  Problem moved = problem_of({Causal{}});
  moved.rule.steps[0] = {1, 0, {}};
  moved.rule.steps_size = moved.rule.nodes[0].step_end = 1;
  EXPECT_FALSE(has_band(moved));
}

}  // namespace
}  // namespace attn_mask
