#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <future>
#include <limits>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "attn_mask/attn_mask.h"
#include "masks.h"

namespace attn_mask {
namespace {

using test::additive_mask;
using test::boolean_mask;
using test::same;
using test::text_of;

constexpr int64_t kBatch = 2;
constexpr int64_t kTable = 7;

struct Element {
  int64_t batch, head, row, column;
  int64_t q, k;  // positions
};
using Attends = std::function<bool(const Element&)>;

struct Range {
  int64_t first, end;

  Range plus(int64_t distance) const { return {first + distance, end + distance}; }
  bool is_in_table() const { return first >= 0 && end <= kTable; }
};
using Fits = std::function<bool(Range queries, Range keys)>;

bool always(Range, Range) { return true; }
bool in_table(Range queries, Range keys) { return queries.is_in_table() && keys.is_in_table(); }

/// A rule, and the same as a function of one element; and whether its tables reach far enough.
struct Pair {
  MaskRule rule;
  Attends attends;
  Fits fits = always;
};

std::optional<int64_t> look_up(const at::Tensor& table, int64_t batch, int64_t position) {
  if (position < 0 || position >= table.size(1)) {
    return std::nullopt;
  }
  return table[table.size(0) == 1 ? 0 : batch][position].item<int64_t>();
}

at::Tensor mask_of(const Pair& pair, int64_t heads, int64_t q_length, int64_t kv_length,
                   int64_t q_offset, int64_t kv_offset) {
  return boolean_mask(kBatch, heads, q_length, kv_length, [&](auto b, auto h, auto r, auto c) {
    return pair.attends({b, h, r, c, r + q_offset, c + kv_offset});
  });
}

/// Random rules over tables of kTable positions, for masks of q_length x kv_length.
class RandomRules {
 public:
  RandomRules(unsigned seed, int64_t q_length, int64_t kv_length)
      : random_(seed), q_length_(q_length), kv_length_(kv_length) {}

  int64_t number(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }

  Pair tree(int64_t depth) {
    switch (depth == 0 ? 9 : number(0, 9)) {
      case 0: {
        const Pair a = tree(depth - 1);
        const Pair b = tree(depth - 1);
        return {a.rule & b.rule, [=](const Element& x) { return a.attends(x) && b.attends(x); },
                [=](Range q, Range k) { return a.fits(q, k) && b.fits(q, k); }};
      }
      case 1: {
        const Pair a = tree(depth - 1);
        const Pair b = tree(depth - 1);
        return {a.rule | b.rule, [=](const Element& x) { return a.attends(x) || b.attends(x); },
                [=](Range q, Range k) { return a.fits(q, k) && b.fits(q, k); }};
      }
      case 2: {
        const Pair below = tree(depth - 1);
        const at::Tensor positions = table(-2, kTable);
        return {reindex(below.rule, positions),
                [=](Element x) {
                  const auto q = look_up(positions, x.batch, x.q);
                  const auto k = look_up(positions, x.batch, x.k);
                  x.q = q.value_or(0);
                  x.k = k.value_or(0);
                  return q && k && below.attends(x);
                },
                in_table};
      }
      case 3: {
        const Pair below = tree(depth - 1);
        const int64_t q_add = number(-3, 3);
        const int64_t k_add = number(-3, 3);
        return {shift(below.rule, q_add, k_add),
                [=](Element x) {
                  x.q += q_add;
                  x.k += k_add;
                  return below.attends(x);
                },
                [=](Range q, Range k) { return below.fits(q.plus(q_add), k.plus(k_add)); }};
      }
      default:
        return leaf();
    }
  }

 private:
  at::Tensor table(int64_t low, int64_t high) {
    at::Tensor values = at::empty({number(1, kBatch), kTable}, at::kLong);
    for (int64_t i = 0; i < values.numel(); ++i) {
      values.data_ptr<int64_t>()[i] = number(low, high);
    }
    return values;
  }

  std::optional<int64_t> side() {
    return number(0, 3) == 0 ? std::nullopt : std::optional<int64_t>(number(-2, 3));
  }

  Pair leaf() {
    switch (number(0, 8)) {
      case 0:
        return {causal(), [](const Element& x) { return x.k <= x.q; }};
      case 1:
        return {bidirectional(), [](const Element&) { return true; }};
      case 2:
        return {nothing(), [](const Element&) { return false; }};
      case 3: {
        const int64_t size = number(1, 4);
        return {sliding_window(size), [=](const Element& x) { return x.k > x.q - size; }};
      }
      case 4: {
        const auto left = side();
        auto right = side();
        if (left && right && *left + *right < 0) {
          right = -*left;  // the one key that is left
        }
        return {window(left, right), [=](const Element& x) {
                  return (!left || x.k >= x.q - *left) && (!right || x.k <= x.q + *right);
                }};
      }
      case 5: {
        const int64_t size = number(1, 4);
        const at::Tensor start = at::tensor({number(0, 3), number(0, 3)}, at::kLong);
        const bool padded = number(0, 1) == 0;
        return {
            padded ? chunked(size, start) : chunked(size), [=](const Element& x) {
              const int64_t from = padded ? start[x.batch].item<int64_t>() : 0;
              const auto chunk = [&](int64_t position) {
                return std::floor(static_cast<double>(position - from) / static_cast<double>(size));
              };
              return chunk(x.q) == chunk(x.k);
            }};
      }
      case 6: {
        const at::Tensor ids = table(-1, 2);
        const bool blocks = number(0, 1) == 0;
        return {blocks ? blockwise(ids) : documents(ids),
                [=](const Element& x) {
                  const auto q = look_up(ids, x.batch, x.q);
                  const auto k = look_up(ids, x.batch, x.k);
                  return q && k && *q == *k && (!blocks || *q >= 0);
                },
                in_table};
      }
      case 7: {
        const at::Tensor mask = table(0, 2);
        return {padding(mask),
                [=](const Element& x) { return look_up(mask, x.batch, x.k).value_or(0) != 0; },
                [](Range, Range keys) { return keys.is_in_table(); }};
      }
      default: {
        const at::Tensor attends = at::empty({1, 2, q_length_, kv_length_}, at::kBool);
        for (int64_t i = 0; i < attends.numel(); ++i) {
          attends.data_ptr<bool>()[i] = number(0, 1) == 1;
        }
        return {bits(attends),
                [=](const Element& x) { return attends[0][x.head][x.row][x.column].item<bool>(); }};
      }
    }
  }

  std::mt19937 random_;
  int64_t q_length_;
  int64_t kv_length_;
};

TEST(Rules, SayWhatTheyMeanInAnyTree) {
  for (unsigned seed = 0; seed < 300; ++seed) {
    RandomRules rules(seed, 3, 5);
    const Pair pair = rules.tree(4);
    const int64_t q_offset = rules.number(-1, 4);
    const int64_t kv_offset = rules.number(-1, 2);
    const BooleanOptions options{.q_offset = q_offset, .kv_offset = kv_offset};
    // Tensors are not read on the host.
    const at::Tensor got = boolean(pair.rule, kBatch, 3, 5,
                                   {.q_positions = at::scalar_tensor(q_offset, at::kLong),
                                    .kv_positions = at::scalar_tensor(kv_offset, at::kLong)});
    const at::Tensor want = mask_of(pair, got.size(1), 3, 5, q_offset, kv_offset);
    ASSERT_TRUE(same(got, want)) << "seed " << seed;
    if (!pair.fits({q_offset, q_offset + 3}, {kv_offset, kv_offset + 5})) {
      ASSERT_THROW(boolean(pair.rule, kBatch, 3, 5, options), c10::ValueError) << "seed " << seed;
      continue;
    }
    ASSERT_TRUE(same(boolean(pair.rule, kBatch, 3, 5, options), want)) << "seed " << seed;
    const at::ScalarType dtype = seed % 2 == 0 ? at::kFloat : at::kBFloat16;
    ASSERT_TRUE(same(additive(pair.rule, kBatch, 3, 5,
                              {.dtype = dtype, .q_offset = q_offset, .kv_offset = kv_offset}),
                     additive_mask(want, dtype)))
        << "seed " << seed;
  }
}

TEST(Rules, SlidingWindowWithCausalityShowsItsSizeOfKeys) {
  const at::Tensor mask = boolean(causal() & sliding_window(3), 1, 6, 6);
  EXPECT_TRUE(at::equal(mask.sum(3)[0][0], at::tensor({1, 2, 3, 3, 3, 3}, at::kLong)));
}

TEST(Rules, AnyWindowFitsAnyNumber) {
  constexpr auto kMost = std::numeric_limits<int64_t>::max();
  constexpr auto kLeast = std::numeric_limits<int64_t>::min();
  const at::Tensor all = at::ones({1, 1, 3, 4}, at::kBool);
  EXPECT_TRUE(same(boolean(sliding_window(kMost), 1, 3, 4), all));
  EXPECT_TRUE(same(boolean(window(kMost, kMost), 1, 3, 4), all));
  EXPECT_TRUE(same(boolean(chunked(kMost), 1, 3, 4), all));
  EXPECT_THROW(sliding_window(kLeast), c10::ValueError);
  EXPECT_THROW(window(kLeast, kMost), c10::ValueError);
  const int64_t far = 1 - (int64_t{1} << 59);
  EXPECT_TRUE(same(boolean(window(far, kMost), 1, 3, 4), at::zeros_like(all)));
}

TEST(Rules, ManyFitIntoOne) {
  MaskRule rule = nothing();
  for (int64_t i = 0; i < 60; ++i) {
    rule = rule | window(i, -i);  // the key i before the query
  }
  const at::Tensor want = boolean_mask(
      1, 1, 70, 70, [](auto, auto, auto q, auto k) { return q - k >= 0 && q - k < 60; });
  EXPECT_TRUE(same(boolean(rule, 1, 70, 70), want));
}

TEST(Options, PositionsBiasAndStride) {
  const at::Tensor positions = at::tensor({5, 0, 3, 1, 1, 4}, at::kInt).view({2, 3});
  const at::Tensor past = at::scalar_tensor(2, at::kLong);
  const at::Tensor bias = at::randn({1, 4, 3, 6}, at::kDouble);
  const at::Tensor got = additive(causal(), 2, 3, 6,
                                  {.dtype = at::kDouble,
                                   .kv_offset = -1,
                                   .q_positions = positions,
                                   .kv_positions = past,
                                   .bias = bias,
                                   .stride_multiple = 8});
  const at::Tensor attends = boolean_mask(2, 4, 3, 6, [&](auto b, auto, auto row, auto column) {
    return column - 1 + 2 <= positions[b][row].template item<int64_t>();
  });
  EXPECT_TRUE(same(got, at::where(attends, bias, test::lowest(at::kDouble))));
  EXPECT_EQ(got.stride(2), 8);
  const at::Tensor plain =
      boolean(causal(), 2, 3, 6, {.kv_offset = -1, .q_positions = positions, .kv_positions = past});
  EXPECT_TRUE(same(plain, attends.narrow(1, 0, 1)));
  EXPECT_EQ(additive(causal(), 1, 2, 3).scalar_type(), at::kFloat);
  EXPECT_TRUE(additive(causal(), 9, 70000, 70000, {.device = at::kMeta}).is_meta());
  EXPECT_EQ(boolean(causal(), 9, 2, 2).stride(0), 0);
}

TEST(Options, ABiasThatIsLearnedGetsItsGradient) {
  const at::Tensor bias = at::zeros({1, 1, 2, 2}).requires_grad_();
  additive(causal(), 1, 2, 2, {.bias = bias}).sum().backward();
  EXPECT_TRUE(at::equal(bias.grad(), at::tensor({1.0F, 0.0F, 1.0F, 1.0F}).view({1, 1, 2, 2})));
}

/// What a line of blocks must list, by their states: 0 empty, 1 partial, 2 full.
void expect_line(const std::vector<int>& states, int listed, const at::Tensor& num_blocks,
                 const at::Tensor& indices) {
  std::vector<int> want;
  for (const bool is_listed : {true, false}) {
    for (size_t i = 0; i < states.size(); ++i) {
      if ((states[i] == listed) == is_listed) {
        want.push_back(static_cast<int>(i));
      }
    }
  }
  EXPECT_EQ(num_blocks.item<int>(), std::count(states.begin(), states.end(), listed));
  EXPECT_TRUE(at::equal(indices, at::tensor(want, at::kInt))) << indices;
}

TEST(BlockMask, ListsTheBlocksOfTheMask) {
  for (unsigned seed = 0; seed < 40; ++seed) {
    RandomRules rules(seed, 7, 6);
    const MaskRule rule = rules.tree(3).rule;
    const int64_t rows = 3;
    const int64_t columns = 3;
    const at::Tensor one = at::scalar_tensor(1, at::kLong);
    const at::Tensor zero = at::scalar_tensor(0, at::kLong);
    const BlockMask got = block_mask(rule, kBatch, 7, 6,
                                     {.heads = 2,
                                      .q_block_size = 3,
                                      .kv_block_size = 2,
                                      .q_positions = one,
                                      .kv_positions = zero});
    EXPECT_EQ(got.q_block_size, 3);
    EXPECT_EQ(got.kv_block_size, 2);
    // Queries after the last see nothing, which makes their blocks partial.
    const at::Tensor dense =
        at::constant_pad_nd(boolean(rule, kBatch, 7, 6, {.q_positions = one, .kv_positions = zero}),
                            {0, 0, 0, 2}, 0)
            .expand({kBatch, 2, 9, 6});
    for (int64_t b = 0; b < kBatch; ++b) {
      for (int64_t h = 0; h < 2; ++h) {
        std::vector<std::vector<int>> by_row(rows);
        std::vector<std::vector<int>> by_column(columns);
        for (int64_t row = 0; row < rows; ++row) {
          for (int64_t column = 0; column < columns; ++column) {
            const at::Tensor block = dense[b][h].narrow(0, row * 3, 3).narrow(1, column * 2, 2);
            const int state = block.all().item<bool>() ? 2 : block.any().item<bool>() ? 1 : 0;
            by_row[static_cast<size_t>(row)].push_back(state);
            by_column[static_cast<size_t>(column)].push_back(state);
          }
        }
        for (int64_t i = 0; i < rows; ++i) {
          const auto& row = by_row[static_cast<size_t>(i)];
          expect_line(row, 1, got.kv_num_blocks[b][h][i], got.kv_indices[b][h][i]);
          expect_line(row, 2, got.full_kv_num_blocks[b][h][i], got.full_kv_indices[b][h][i]);
        }
        for (int64_t i = 0; i < columns; ++i) {
          const auto& column = by_column[static_cast<size_t>(i)];
          expect_line(column, 1, got.q_num_blocks[b][h][i], got.q_indices[b][h][i]);
          expect_line(column, 2, got.full_q_num_blocks[b][h][i], got.full_q_indices[b][h][i]);
        }
      }
    }
  }
}

TEST(Values, CopiesAreIndependentOfTheOriginal) {
  static_assert(std::is_copy_assignable_v<MaskRule> && !std::is_default_constructible_v<MaskRule>);
  MaskRule rule = causal();
  const MaskRule moved = std::move(rule);
  // Still a rule: moving copies.
  EXPECT_TRUE(same(boolean(rule, 1, 3, 3), boolean(moved, 1, 3, 3)));
  rule = rule & nothing();
  EXPECT_FALSE(boolean(rule, 1, 3, 3).any().item<bool>());
  EXPECT_TRUE(boolean(moved, 1, 3, 3).any().item<bool>());
}

TEST(Values, OutliveTheOtherOwnersOfTheirTensors) {
  std::optional<MaskRule> rule;
  {
    const at::Tensor mask = at::tensor({0, 1, 1, 1}, at::kLong).view({1, 4});
    rule = reindex(
        (causal() & padding(mask)) | documents(at::tensor({1, 1, 2, 2}, at::kLong).view({1, 4})),
        at::tensor({3, 2, 1, 0}, at::kInt).view({1, 4}));
  }
  // The same sizes again, so that freed memory would be used anew.
  const at::Tensor noise = at::full({1, 4}, 7, at::kLong).add(at::full({1, 4}, 7, at::kInt));
  const at::Tensor want = boolean_mask(1, 1, 4, 4, [](auto, auto, auto row, auto column) {
    const int64_t q = 3 - row;
    const int64_t k = 3 - column;
    return (k <= q && k > 0) || (q < 2) == (k < 2);
  });
  EXPECT_TRUE(same(boolean(*rule, 1, 4, 4), want)) << noise;
}

TEST(Values, ShareTheirTensors) {
  const at::Tensor mask = at::ones({1, 3}, at::kBool);
  const MaskRule rule = causal() & padding(mask);
  EXPECT_TRUE(boolean(rule, 1, 3, 3).any().item<bool>());
  mask.zero_();
  EXPECT_FALSE(boolean(rule, 1, 3, 3).any().item<bool>());
  const MaskRule elsewhere = rule.to(at::kMeta);
  EXPECT_TRUE(boolean(elsewhere, 1, 3, 3).is_meta());
  EXPECT_FALSE(boolean(rule, 1, 3, 3).is_meta());
}

TEST(Threads, ManyAskOneRule) {
  const at::Tensor ids = at::arange(64, at::kLong).div(9, "floor").view({1, 64});
  const MaskRule rule = (causal() | blockwise(ids)) & padding(ids.ne(3));
  const at::Tensor want = boolean_mask(1, 1, 64, 64, [](auto, auto, auto q, auto k) {
    return (k <= q || q / 9 == k / 9) && k / 9 != 3;
  });
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] {
      for (int repeat = 0; repeat < 100; ++repeat) {
        const MaskRule copy = rule & bidirectional();
        wrong += same(boolean(copy, 1, 64, 64), want) ? 0 : 1;
        wrong += same(boolean(rule, 1, 64, 64), want) ? 0 : 1;
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  EXPECT_EQ(wrong, 0);
}

TEST(Threads, AnErrorStaysInItsThread) {
  const MaskRule rule = padding(at::ones({2, 3}));
  auto failing = std::async(std::launch::async, [&] { return boolean(rule, 1, 2, 3); });
  EXPECT_THROW(failing.get(), c10::ValueError);
  // Also from within a parallel region.
  EXPECT_THROW(at::parallel_for(0, 4, 1, [&](int64_t, int64_t) { boolean(rule, 1, 2, 3); }),
               c10::ValueError);
  EXPECT_EQ(boolean(causal(), 1, 2, 3).sizes(), at::IntArrayRef({1, 1, 2, 3}));
}

TEST(Masks, RowsWithoutAKeyAreUnmasked) {
  const at::Tensor mask = at::tensor({0, 0, 1, 0, 0, 0}, at::kLong).view({2, 3});
  const MaskRule rule = causal() & padding(mask);
  const at::Tensor attends = boolean(rule, 2, 3, 3);
  const at::Tensor want = attends | attends.any(-1, /*keepdim=*/true).logical_not();
  EXPECT_EQ(want.sum().item<int64_t>(), 3 + 3 + 1 + 9);
  EXPECT_TRUE(same(boolean(rule, 2, 3, 3, {.unmask_unattended = true}), want));
  const at::Tensor low = at::scalar_tensor(std::numeric_limits<float>::lowest());
  EXPECT_TRUE(same(additive(rule, 2, 3, 3, {.unmask_unattended = true}),
                   at::where(want, at::zeros({}), low)));
  const at::Tensor bias = at::randn({1, 2, 3, 3});
  EXPECT_TRUE(same(additive(rule, 2, 3, 3, {.bias = bias, .unmask_unattended = true}),
                   at::where(want, bias, low)));
}

TEST(Masks, MaskedElementsHoldAnyNumberUpTo0) {
  const at::Tensor attends = boolean(causal(), 1, 2, 3);
  for (const double value : {-1e4, -0.5, -std::numeric_limits<double>::infinity(), 0.0}) {
    const at::Tensor want =
        at::where(attends, at::zeros({}, at::kHalf), at::scalar_tensor(value, at::kHalf));
    EXPECT_TRUE(
        same(additive(causal(), 1, 2, 3, {.dtype = at::kHalf, .masked_value = value}), want));
  }
  const auto text = [](double value) {
    return text_of<c10::ValueError>(
        [&] { additive(causal(), 1, 2, 3, {.dtype = at::kHalf, .masked_value = value}); });
  };
  EXPECT_EQ(text(1.0), "additive: expected masked_value to be at most 0, but got 1");
  EXPECT_EQ(text(-1e9),
            "additive: expected masked_value to be a number that Half holds, but got -1e+09");
}

TEST(Errors, UndefinedTensorsAreNamed) {
  const at::Tensor undefined;
  const auto text = [](const std::string& function, const std::string& argument) {
    return function + ": expected " + argument + " to be a tensor, but got an undefined one";
  };
  const auto ids = at::zeros({1, 3}, at::kLong);
  using E = c10::TypeError;
  EXPECT_EQ(text_of<E>([&] { padding(undefined); }), text("padding", "mask"));
  EXPECT_EQ(text_of<E>([&] { documents(undefined); }), text("documents", "ids"));
  EXPECT_EQ(text_of<E>([&] { blockwise(undefined); }), text("blockwise", "ids"));
  EXPECT_EQ(text_of<E>([&] { bits(undefined); }), text("bits", "attends"));
  EXPECT_EQ(text_of<E>([&] { chunked(2, undefined); }), text("chunked", "left_padding"));
  EXPECT_EQ(text_of<E>([&] { reindex(causal(), undefined); }), text("reindex", "positions"));
  EXPECT_EQ(text_of<E>([&] { additive(causal(), 1, 1, 1, {.bias = undefined}); }),
            text("additive", "bias"));
  EXPECT_EQ(text_of<E>([&] { additive(causal(), 1, 1, 1, {.q_positions = undefined}); }),
            text("additive", "q_positions"));
  EXPECT_EQ(text_of<E>([&] { boolean(documents(ids), 1, 1, 1, {.kv_positions = undefined}); }),
            text("boolean", "kv_positions"));
  EXPECT_EQ(text_of<E>([&] { block_mask(causal(), 1, 1, 1, {.kv_positions = undefined}); }),
            text("block_mask", "kv_positions"));
}

TEST(Rules, OneRowOfATableServesTheWholeBatch) {
  const at::Tensor ids = at::tensor({0, 0, 1, 1}, at::kLong);
  const at::Tensor positions = at::tensor({0, 1, 0, 1}, at::kLong);
  const at::Tensor mask = at::tensor({1, 0, 1, 1}, at::kLong);
  const auto rule = [&](const at::Tensor& of_ids, const at::Tensor& of_positions,
                        const at::Tensor& of_mask) {
    return (documents(of_ids) | blockwise(of_ids)) & reindex(causal(), of_positions) &
           padding(of_mask);
  };
  const auto each_row = [](const at::Tensor& table) { return table.expand({3, 4}).contiguous(); };
  const MaskRule want = rule(each_row(ids), each_row(positions), each_row(mask));
  for (const MaskRule& one : {rule(ids, positions, mask),
                              rule(ids.view({1, 4}), positions.view({1, 4}), mask.view({1, 4}))}) {
    EXPECT_TRUE(boolean(one, 3, 4, 4).equal(boolean(want, 3, 4, 4)));
    const BlockMask blocks = block_mask(one, 3, 4, 4, {.q_block_size = 2, .kv_block_size = 2});
    const BlockMask wanted = block_mask(want, 3, 4, 4, {.q_block_size = 2, .kv_block_size = 2});
    EXPECT_TRUE(blocks.kv_num_blocks.equal(wanted.kv_num_blocks));
    EXPECT_TRUE(blocks.full_kv_num_blocks.equal(wanted.full_kv_num_blocks));
  }
}

TEST(Errors, SayWhatWasExpectedAndWhatCame) {
  const at::Tensor ids = at::zeros({3, 4}, at::kLong);
  using Value = c10::ValueError;
  using Type = c10::TypeError;
  EXPECT_EQ(text_of<Value>([&] { chunked(0); }), "chunked: expected size not to be 0");
  EXPECT_EQ(text_of<Value>([&] { chunked(-2); }),
            "chunked: expected size to be positive, but got -2");
  EXPECT_EQ(text_of<Value>([&] { boolean(causal(), -1, 2, 3); }),
            "boolean: expected batch_size to be a size (>= 0), but got -1");
  EXPECT_EQ(text_of<Value>([&] { block_mask(causal(), 1, 2, 3, {.q_block_size = 0}); }),
            "block_mask: expected q_block_size to be positive and less than 2^31, but got 0");
  EXPECT_EQ(text_of<Value>([&] { boolean(documents(ids), 2, 4, 4); }),
            "boolean: expected the ids of documents to have a batch size of 1 or 2, but got 2-D "
            "[3, 4]");
  EXPECT_EQ(text_of<Value>([&] { boolean(documents(ids), 3, 2, 5); }),
            "documents: expected ids to be of length 5 or longer, for the keys of boolean, but got "
            "[3, 4]");
  EXPECT_EQ(text_of<Value>([&] { additive(causal() | blockwise(ids), 3, 2, 4, {.q_offset = 3}); }),
            "blockwise: expected ids to be of length 5 or longer, for the queries of additive, but "
            "got [3, 4]");
  EXPECT_EQ(text_of<Value>([&] { block_mask(padding(ids[0]), 1, 9, 5); }),
            "padding: expected mask to be of length 5 or longer, for the keys of block_mask, but "
            "got [1, 4]");
  EXPECT_EQ(text_of<Value>([&] { boolean(reindex(causal(), ids), 3, 2, 2, {.kv_offset = 3}); }),
            "reindex: expected positions to be of length 5 or longer, for the keys of boolean, but "
            "got [3, 4]");
  EXPECT_EQ(text_of<Value>([&] { boolean(shift(documents(ids), -1, 0), 3, 2, 2); }),
            "documents: expected ids for positions from 0 on, but the queries of boolean begin at "
            "-1");
  EXPECT_THROW(boolean(documents(ids), 3, 2, 2, {.kv_offset = std::numeric_limits<int64_t>::max()}),
               c10::ValueError);
  EXPECT_EQ(boolean(padding(ids), 3, 9, 4).size(2), 9);  // has no table of queries
  for (const int64_t size : {0, -3}) {
    EXPECT_EQ(text_of<Value>([&] { sliding_window(size); }),
              "sliding_window: expected size to be positive, but got " + std::to_string(size));
  }
  EXPECT_EQ(text_of<Value>([&] { window(-1, -1); }),
            "window: expected left and right to leave a key visible (an open side is nothing, not "
            "-1), but got -1 and -1");
  EXPECT_EQ(text_of<Value>([&] { window(std::nullopt, -(int64_t{1} << 59)); }),
            "window: expected right to be more than -2^59, or nothing for an open side, but got "
            "-576460752303423488");
  EXPECT_EQ(
      text_of<Value>([&] { padding(ids[0][0]); }),
      "padding: expected mask to be 1-D [length] or 2-D [batch_size, length], but got 0-D []");
  EXPECT_EQ(text_of<Value>([&] { documents(ids.view({1, 3, 4})); }),
            "documents: expected ids to be 1-D [length] or 2-D [batch_size, length], but got 3-D "
            "[1, 3, 4]");
  EXPECT_EQ(text_of<Value>([&] { chunked(2, ids); }),
            "chunked: expected left_padding to be 1-D [batch_size], but got 2-D [3, 4]");
  EXPECT_EQ(text_of<Type>([&] { padding(ids.to(at::kComplexFloat)); }),
            "padding: expected mask to be of a boolean, integer or real floating dtype, but got "
            "ComplexFloat");
  EXPECT_EQ(text_of<Type>([&] { blockwise(ids.to(at::kFloat)); }),
            "blockwise: expected ids to be uint8 or a signed integer, but got Float");
  EXPECT_EQ(text_of<Type>([&] { documents(ids.to(at::kBool)); }),
            "documents: expected ids to be uint8 or a signed integer, but got Bool");
  EXPECT_EQ(text_of<Type>([&] { reindex(causal(), ids.to(at::kHalf)); }),
            "reindex: expected positions to be uint8 or a signed integer, but got Half");
  EXPECT_EQ(text_of<Type>([&] { bits(ids.view({1, 1, 3, 4})); }),
            "bits: expected attends to be bool, but got Long");
  EXPECT_EQ(text_of<Type>([&] { additive(causal(), 1, 2, 3, {.dtype = at::kInt}); }),
            "additive: expected dtype to be float16, bfloat16, float32 or float64, but got Int");
  EXPECT_EQ(text_of<Type>([&] { additive(causal(), 1, 2, 3, {.bias = ids.view({1, 1, 3, 4})}); }),
            "additive: expected bias to be Float, but got Long");
  EXPECT_EQ(text_of<Type>([&] { padding(ids.to_sparse()); }),
            "padding: expected mask to be a strided tensor, but got layout Sparse");
  EXPECT_EQ(text_of<Value>([&] { boolean(padding(ids), 3, 4, 4, {.device = at::kMeta}); }),
            "boolean: expected device to be that of the operands, which is cpu, but got meta");
  EXPECT_EQ(text_of<Value>([&] { boolean(causal(), 1, 2, 3, {.stride_multiple = 0}); }),
            "boolean: expected stride_multiple to be a number of elements from 1 to 2^31 - 1, but "
            "got 0");
  EXPECT_EQ(text_of<Value>([&] { shift(causal(), int64_t{1} << 60, 0); }),
            "shift: expected q_offset to be within 2^59 of 0, but got 1152921504606846976");
  EXPECT_EQ(text_of<Value>([&] { shift(causal(), 0, -(int64_t{1} << 59)); }),
            "shift: expected kv_offset to be within 2^59 of 0, but got -576460752303423488");
  const int64_t far = (int64_t{1} << 59) - 1;
  EXPECT_TRUE(boolean(shift(causal(), -far, -far), 1, 3, 3).equal(boolean(causal(), 1, 3, 3)));
  EXPECT_EQ(
      text_of<c10::NotImplementedError>([&] { boolean(causal(), 1, 2, 3, {.device = at::kXLA}); }),
      "boolean: expected device to be cpu, cuda or meta, but got xla");
  MaskRule deep = causal();
  for (int i = 0; i < 9; ++i) {
    deep = reindex(deep, ids);
  }
  EXPECT_EQ(text_of<c10::NotImplementedError>([&] { boolean(deep, 3, 4, 4); }),
            "boolean: expected rule to change the positions of one leaf at most 8 times, but it "
            "does so more often");
}

}  // namespace
}  // namespace attn_mask
