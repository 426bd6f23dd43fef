#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <limits>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "attn_mask/attn_mask.h"
#include "masks.h"

namespace attn_mask {
namespace {

using test::additive_mask;
using test::boolean_mask;
using test::same;
using test::text_of;

const double kMin = std::numeric_limits<float>::lowest();

/// Additive float32 from rows of ones and zeros.
at::Tensor additive(const std::vector<std::vector<double>>& rows) {
  at::Tensor mask = at::empty(
      {static_cast<int64_t>(rows.size()), static_cast<int64_t>(rows.front().size())}, at::kFloat);
  for (size_t i = 0; i < rows.size(); ++i) {
    for (size_t j = 0; j < rows[i].size(); ++j) {
      mask[static_cast<int64_t>(i)][static_cast<int64_t>(j)] = rows[i][j] != 0 ? 0.0 : kMin;
    }
  }
  return mask;
}

at::Tensor padding() { return at::tensor({0, 1, 1, 1, 1, 1, 1, 0}, at::kLong).view({2, 4}); }

TEST(ToCausal4d, CausalAndWindowed) {
  const AttentionMaskConverter converter(/*is_causal=*/true, /*sliding_window=*/1);
  const auto mask = converter.to_causal_4d(2, 3, 5, at::kFloat);
  ASSERT_TRUE(mask.has_value());
  EXPECT_EQ(mask->sizes(), at::IntArrayRef({2, 1, 3, 5}));
  EXPECT_EQ(mask->stride(0), 0);
  EXPECT_TRUE(
      at::equal((*mask)[1][0], additive({{0, 1, 1, 0, 0}, {0, 0, 1, 1, 0}, {0, 0, 0, 1, 1}})));
}

TEST(ToCausal4d, OneQueryWithoutWindowNeedsNoMask) {
  EXPECT_FALSE(AttentionMaskConverter(true).to_causal_4d(2, 1, 5, at::kFloat).has_value());
  EXPECT_TRUE(AttentionMaskConverter(true, 2).to_causal_4d(2, 1, 5, at::kFloat).has_value());
}

TEST(To4d, PaddingAndCausality) {
  const at::Tensor mask = AttentionMaskConverter(true).to_4d(padding(), 2, at::kFloat, 4);
  EXPECT_TRUE(at::equal(mask[0][0], additive({{0, 1, 1, 0}, {0, 1, 1, 1}})));
  EXPECT_TRUE(at::equal(mask[1][0], additive({{1, 1, 1, 0}, {1, 1, 1, 0}})));
}

TEST(ExpandMask, RepeatsThePaddingForEachQuery) {
  const at::Tensor mask = expand_mask(padding(), at::kFloat, 2);
  EXPECT_TRUE(at::equal(mask[0][0], additive({{0, 1, 1, 1}, {0, 1, 1, 1}})));
  EXPECT_EQ(expand_mask(padding(), at::kHalf).sizes(), at::IntArrayRef({2, 1, 4, 4}));
}

TEST(UnmaskUnattended, OpensRowsWithNegativeZero) {
  const at::Tensor unmasked = unmask_unattended(additive({{0, 0, 0}, {0, 1, 0}}), at::Scalar(kMin));
  EXPECT_TRUE(at::equal(unmasked, additive({{1, 1, 1}, {0, 1, 0}})));
  EXPECT_TRUE(unmasked[0].signbit().all().item<bool>());
}

TEST(Prepare, FollowsTheSkipRules) {
  const at::Tensor embeds = at::zeros({2, 4, 8}, at::kFloat);
  const at::Tensor ones = at::ones({2, 4}, at::kLong);
  EXPECT_FALSE(prepare_4d_causal_attention_mask_for_sdpa(ones, {2, 4}, embeds, 0).has_value());
  EXPECT_FALSE(
      prepare_4d_causal_attention_mask_for_sdpa(std::nullopt, {2, 4}, embeds, 0).has_value());
  EXPECT_TRUE(prepare_4d_causal_attention_mask_for_sdpa(padding(), {2, 4}, embeds, 0).has_value());
  EXPECT_TRUE(prepare_4d_causal_attention_mask_for_sdpa(ones, {2, 4}, embeds, 0, std::nullopt,
                                                        /*allow_skip=*/false)
                  .has_value());
  EXPECT_TRUE(prepare_4d_causal_attention_mask(ones, {2, 4}, embeds, 0).has_value());
  EXPECT_FALSE(prepare_4d_attention_mask_for_sdpa(ones, at::kFloat).has_value());
  EXPECT_TRUE(prepare_4d_attention_mask_for_sdpa(padding(), at::kFloat).has_value());
  EXPECT_TRUE(ignore_causal_mask_sdpa(ones, embeds, 0));
  EXPECT_FALSE(ignore_causal_mask_sdpa(ones, embeds, 3));
  EXPECT_FALSE(ignore_causal_mask_sdpa(ones, embeds, 0, /*sliding_window=*/4));
}

TEST(Prepare, A4dMaskPassesThroughForSdpa) {
  const at::Tensor embeds = at::zeros({2, 4, 8}, at::kFloat);
  const at::Tensor mask = at::zeros({2, 1, 4, 4});
  const auto result = prepare_4d_causal_attention_mask_for_sdpa(mask, {2, 4}, embeds, 0);
  EXPECT_TRUE(result->is_same(mask));
}

TEST(Create, EqualsTheConverter) {
  const auto mask = create_4d_causal_attention_mask({2, 3}, at::kDouble, at::kCPU, 2, 2);
  const auto same = AttentionMaskConverter(true, 2).to_causal_4d(2, 3, 5, at::kDouble);
  EXPECT_TRUE(at::equal(*mask, *same));
  EXPECT_TRUE(at::equal(*mask, make_causal_mask({2, 3}, at::kDouble, at::kCPU, 2, 2)));
}

/// Keys up to the query's own, W of them before it with a window of W, the last query at the last
/// key.
bool is_seen(int64_t row, int64_t column, int64_t q_length, int64_t kv_length,
             std::optional<int64_t> window) {
  const int64_t position = row + kv_length - q_length;
  return column <= position && (!window || column >= position - *window);
}

TEST(Reference, AllFunctionsAgainstLoops) {
  std::mt19937 random(7);
  const auto number = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  for (int repeat = 0; repeat < 300; ++repeat) {
    const int64_t b = number(0, 3);
    const int64_t q = number(0, 4);
    const int64_t past = number(0, 3);
    const int64_t kv = q + past;
    const std::optional<int64_t> window =
        number(0, 1) == 0 ? std::nullopt : std::optional<int64_t>(number(1, 3));
    const at::ScalarType dtype =
        std::vector{at::kHalf, at::kBFloat16, at::kFloat, at::kDouble}[repeat % 4];
    const at::Tensor embeds = at::zeros({b, q, 2}, dtype);
    // Where 2 does not attend: only what equals 1 does.
    const at::Tensor mask = at::randint(0, 3, {b, kv}, repeat % 3 == 0 ? at::kFloat : at::kLong);
    const auto shown = [&](int64_t batch, int64_t column) {
      return mask[batch][column].item<double>() == 1;
    };
    const at::Tensor causal = additive_mask(
        boolean_mask(
            b, 1, q, kv,
            [&](auto, auto, auto row, auto column) { return is_seen(row, column, q, kv, window); }),
        dtype);
    const at::Tensor padded = additive_mask(
        boolean_mask(b, 1, q, kv,
                     [&](auto batch, auto, auto row, auto column) {
                       return shown(batch, column) && is_seen(row, column, q, kv, window);
                     }),
        dtype);
    const at::Tensor expanded = additive_mask(
        boolean_mask(b, 1, q, kv,
                     [&](auto batch, auto, auto, auto column) { return shown(batch, column); }),
        dtype);
    const AttentionMaskConverter converter(true, window);
    EXPECT_TRUE(same(make_causal_mask({b, q}, dtype, at::kCPU, past, window), causal));
    EXPECT_TRUE(same(converter.to_4d(mask, q, dtype, kv), padded));
    EXPECT_TRUE(same(AttentionMaskConverter(false).to_4d(mask, q, dtype), expanded));
    EXPECT_TRUE(same(expand_mask(mask, dtype, q), expanded));
    EXPECT_TRUE(same(prepare_4d_attention_mask(mask, dtype, q), expanded));
    EXPECT_TRUE(
        same(*prepare_4d_attention_mask_for_sdpa(mask, dtype, q, /*allow_skip=*/false), expanded));
    EXPECT_TRUE(
        same(*prepare_4d_causal_attention_mask(mask, {b, q}, embeds, past, window), padded));
    EXPECT_TRUE(same(*prepare_4d_causal_attention_mask_for_sdpa(mask, {b, q}, embeds, past, window,
                                                                /*allow_skip=*/false),
                     padded));
    // A 4-D mask of ones and zeros is used as it is.
    const at::Tensor attends = padded.eq(0);
    EXPECT_TRUE(same(*prepare_4d_causal_attention_mask(attends, {b, q}, embeds, past), padded));
    if (q > 1 || window) {
      EXPECT_TRUE(same(*converter.to_causal_4d(b, q, kv, dtype), causal));
      EXPECT_TRUE(
          same(*create_4d_causal_attention_mask({b, q}, dtype, at::kCPU, past, window), causal));
      EXPECT_TRUE(same(
          *prepare_4d_causal_attention_mask(std::nullopt, {b, q}, embeds, past, window), causal));
    }
    const at::Tensor unmasked =
        at::where(padded.ne(0).all(3, true), at::full_like(padded, -0.0), padded);
    EXPECT_TRUE(same(unmask_unattended(padded, test::lowest(dtype)), unmasked));
    // Two switches; a 4-D mask that is not unmasked comes back itself.
    for (const bool unmasks : {false, true}) {
      EXPECT_TRUE(same(*prepare_4d_causal_attention_mask_for_sdpa(
                           mask, {b, q}, embeds, past, window, /*allow_skip=*/false, unmasks),
                       unmasks ? unmasked : padded));
      const at::Tensor same_4d = *prepare_4d_causal_attention_mask_for_sdpa(
          padded, {b, q}, embeds, past, window, /*allow_skip=*/true, unmasks);
      EXPECT_TRUE(same(same_4d, unmasks ? unmasked : padded));
      EXPECT_EQ(same_4d.is_same(padded), !unmasks);
    }
  }
}

TEST(Meta, GivesShapesWithoutMemory) {
  const at::Device meta(at::kMeta);
  const auto causal = AttentionMaskConverter(true).to_causal_4d(3, 100000, 100000, at::kHalf, meta);
  EXPECT_TRUE(causal->is_meta());
  EXPECT_EQ(causal->sizes(), at::IntArrayRef({3, 1, 100000, 100000}));
  EXPECT_EQ(causal->scalar_type(), at::kHalf);
  const at::Tensor mask = at::ones({2, 7}, at::TensorOptions().device(meta));
  EXPECT_EQ(AttentionMaskConverter(true).to_4d(mask, 5, at::kBFloat16, 7).sizes(),
            at::IntArrayRef({2, 1, 5, 7}));
  EXPECT_EQ(expand_mask(mask, at::kFloat, 3).sizes(), at::IntArrayRef({2, 1, 3, 7}));
  EXPECT_EQ(unmask_unattended(mask, 0.0).sizes(), at::IntArrayRef({2, 7}));
}

TEST(Errors, HaveTheTypesAndTextsThatPythonHas) {
  using Value = c10::ValueError;
  using Type = c10::TypeError;
  const AttentionMaskConverter causal(true);
  const at::Tensor mask = at::ones({2, 4});
  EXPECT_EQ(text_of<Value>([] { AttentionMaskConverter(true, 0); }),
            "Make sure that when passing `sliding_window` that its value is a strictly positive "
            "integer, not `0`");
  EXPECT_EQ(text_of<Value>([] { AttentionMaskConverter(false).to_causal_4d(1, 2, 2, at::kFloat); }),
            "Please use `to_causal_4d` only if attn_mask::AttentionMaskConverter has `is_causal` "
            "set to True.");
  EXPECT_EQ(text_of<Value>([&] { causal.to_causal_4d(1, 3, 2, at::kFloat); }),
            "to_causal_4d: expected key_value_length to be at least query_length, which is 3, but "
            "got 2");
  EXPECT_EQ(text_of<Value>([&] { causal.to_causal_4d(-1, 3, 3, at::kFloat); }),
            "to_causal_4d: expected batch_size to be a size (>= 0), but got -1");
  EXPECT_EQ(
      text_of<Type>([&] { causal.to_causal_4d(1, 3, 3, at::kInt); }),
      "to_causal_4d: expected dtype to be float16, bfloat16, float32 or float64, but got Int");
  EXPECT_EQ(text_of<Value>([&] { causal.to_4d(mask, 2, at::kFloat); }),
            "This attention mask converter is causal. Make sure to pass `key_value_length` to "
            "correctly create a causal mask.");
  EXPECT_EQ(text_of<Value>([&] { causal.to_4d(mask, 2, at::kFloat, 5); }),
            "to_4d: expected attention_mask_2d to be 2-D [batch_size, kv_length] with kv_length 5, "
            "but got 2-D [2, 4]");
  EXPECT_EQ(text_of<Value>([&] { causal.to_4d(mask[0], 2, at::kFloat, 4); }),
            "to_4d: expected attention_mask_2d to be 2-D [batch_size, kv_length], but got 1-D [4]");
  EXPECT_EQ(text_of<Type>([&] { causal.to_4d(mask.to(at::kComplexFloat), 2, at::kFloat, 4); }),
            "to_4d: expected attention_mask_2d to be of a boolean, integer or real floating dtype, "
            "but got ComplexFloat");
  EXPECT_EQ(text_of<Type>([&] { causal.to_4d(mask.to_sparse(), 2, at::kFloat, 4); }),
            "to_4d: expected attention_mask_2d to be a strided tensor, but got layout Sparse");
  EXPECT_EQ(text_of<c10::NotImplementedError>(
                [&] { AttentionMaskConverter(false, 2).to_4d(mask, 2, at::kFloat); }),
            "Sliding window is currently only implemented for causal masking");
  EXPECT_EQ(text_of<c10::NotImplementedError>(
                [&] { causal.to_causal_4d(1, 2, 2, at::kFloat, at::kXLA); }),
            "to_causal_4d: expected device to be cpu, cuda or meta, but got xla");
  EXPECT_EQ(text_of<Value>([&] { unmask_unattended(mask.to(at::kBool), 0.0); }),
            "AttentionMaskConverter._unmask_unattended expects a float `expanded_mask`, got a "
            "BoolTensor.");
  EXPECT_EQ(text_of<Value>([&] { make_causal_mask({1, 2, 3}, at::kFloat, at::kCPU); }),
            "_make_causal_mask: expected input_ids_shape to be (batch_size, query_length), but got "
            "[1, 2, 3]");
  EXPECT_EQ(text_of<Value>([&] { prepare_4d_causal_attention_mask(mask, {2}, mask, 0); }),
            "_prepare_4d_causal_attention_mask: expected input_shape to be (batch_size, "
            "query_length), but got [2]");
  EXPECT_EQ(text_of<Value>(
                [&] { prepare_4d_causal_attention_mask(at::ones({2, 1, 4, 3}), {2, 4}, mask, 0); }),
            "Incorrect 4D attention_mask shape: (2, 1, 4, 3); expected: (2, 1, 4, 4).");
  // Whatever the numbers: the caller's error, not a crash.
  constexpr auto kMost = std::numeric_limits<int64_t>::max();
  constexpr auto kLeast = std::numeric_limits<int64_t>::min();
  for (const int64_t number : {kMost, kMost / 2, kLeast, kLeast / 2 - 1}) {
    EXPECT_THROW(causal.to_causal_4d(1, number, number, at::kFloat), Value);
    EXPECT_THROW(make_causal_mask({number, 2}, at::kFloat, at::kCPU, number), Value);
    EXPECT_THROW(expand_mask(mask, at::kFloat, number), Value);
    EXPECT_THROW(prepare_4d_causal_attention_mask(mask, {2, number}, mask, number), Value);
    EXPECT_THROW(additive(attn_mask::causal(), 2, number, number), Value);
  }
}

TEST(Errors, UndefinedTensorsAreNamed) {
  const at::Tensor none;
  const at::Tensor ones = at::ones({2, 4});
  const auto text = [](const std::string& function, const std::string& argument) {
    return function + ": expected " + argument + " to be a tensor, but got an undefined one";
  };
  using E = c10::TypeError;
  EXPECT_EQ(text_of<E>([&] { expand_mask(none, at::kFloat); }), text("_expand_mask", "mask"));
  EXPECT_EQ(text_of<E>([&] { unmask_unattended(none, 0.0); }),
            text("_unmask_unattended", "expanded_mask"));
  EXPECT_EQ(text_of<E>([&] { AttentionMaskConverter(true).to_4d(none, 2, at::kFloat, 4); }),
            text("to_4d", "attention_mask_2d"));
  EXPECT_EQ(text_of<E>([&] { prepare_4d_attention_mask(none, at::kFloat); }),
            text("_prepare_4d_attention_mask", "mask"));
  EXPECT_EQ(text_of<E>([&] { prepare_4d_attention_mask_for_sdpa(none, at::kFloat); }),
            text("_prepare_4d_attention_mask_for_sdpa", "mask"));
  EXPECT_EQ(text_of<E>([&] { ignore_causal_mask_sdpa(none, ones, 0); }),
            text("_ignore_causal_mask_sdpa", "attention_mask"));
  EXPECT_EQ(text_of<E>([&] { ignore_causal_mask_sdpa(std::nullopt, none, 0); }),
            text("_ignore_causal_mask_sdpa", "inputs_embeds"));
  EXPECT_EQ(text_of<E>([&] { prepare_4d_causal_attention_mask(none, {2, 4}, ones, 0); }),
            text("_prepare_4d_causal_attention_mask", "attention_mask"));
  EXPECT_EQ(text_of<E>([&] { prepare_4d_causal_attention_mask(ones, {2, 4}, none, 0); }),
            text("_prepare_4d_causal_attention_mask", "inputs_embeds"));
  EXPECT_EQ(text_of<E>([&] { prepare_4d_causal_attention_mask_for_sdpa(none, {2, 4}, ones, 0); }),
            text("_prepare_4d_causal_attention_mask_for_sdpa", "attention_mask"));
  EXPECT_EQ(
      text_of<E>([&] { prepare_4d_causal_attention_mask_for_sdpa(std::nullopt, {2, 4}, none, 0); }),
      text("_prepare_4d_causal_attention_mask_for_sdpa", "inputs_embeds"));
}

TEST(Threads, ManyBuildMasksAtOnce) {
  const at::Tensor mask = padding();
  const AttentionMaskConverter converter(true, 2);
  const at::Tensor want = converter.to_4d(mask, 3, at::kFloat, 4);
  std::vector<int> wrong(8, 0);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < wrong.size(); ++i) {
    threads.emplace_back([&, i] {
      for (int repeat = 0; repeat < 200; ++repeat) {
        wrong[i] += at::equal(converter.to_4d(mask, 3, at::kFloat, 4), want) ? 0 : 1;
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  EXPECT_EQ(wrong, std::vector<int>(8, 0));
}

}  // namespace
}  // namespace attn_mask
