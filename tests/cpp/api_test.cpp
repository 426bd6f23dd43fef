#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <limits>
#include <thread>
#include <vector>

#include "attn_mask/attn_mask.h"

namespace attn_mask {
namespace {

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
  const at::Tensor opened = unmask_unattended(additive({{0, 0, 0}, {0, 1, 0}}), at::Scalar(kMin));
  EXPECT_TRUE(at::equal(opened, additive({{1, 1, 1}, {0, 1, 0}})));
  EXPECT_TRUE(opened[0].signbit().all().item<bool>());
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

TEST(Errors, HaveTheTypesThatPythonHas) {
  const AttentionMaskConverter causal(true);
  const at::Tensor mask = at::ones({2, 4});
  EXPECT_THROW(AttentionMaskConverter(true, 0), c10::ValueError);
  EXPECT_THROW(AttentionMaskConverter(false).to_causal_4d(1, 2, 2, at::kFloat), c10::ValueError);
  EXPECT_THROW(causal.to_causal_4d(1, 3, 2, at::kFloat), c10::ValueError);
  EXPECT_THROW(causal.to_causal_4d(-1, 3, 3, at::kFloat), c10::ValueError);
  EXPECT_THROW(causal.to_causal_4d(1, 3, 3, at::kInt), c10::TypeError);
  EXPECT_THROW(causal.to_4d(mask, 2, at::kFloat), c10::ValueError);
  EXPECT_THROW(causal.to_4d(mask, 2, at::kFloat, 5), c10::ValueError);
  EXPECT_THROW(causal.to_4d(mask[0], 2, at::kFloat, 4), c10::ValueError);
  EXPECT_THROW(causal.to_4d(mask.to(at::kComplexFloat), 2, at::kFloat, 4), c10::TypeError);
  EXPECT_THROW(causal.to_4d(mask.to_sparse(), 2, at::kFloat, 4), c10::TypeError);
  EXPECT_THROW(AttentionMaskConverter(false, 2).to_4d(mask, 2, at::kFloat),
               c10::NotImplementedError);
  EXPECT_THROW(expand_mask(at::Tensor(), at::kFloat), c10::TypeError);
  EXPECT_THROW(unmask_unattended(mask.to(at::kBool), 0.0), c10::ValueError);
  const auto huge = std::numeric_limits<int64_t>::max() / 2;
  EXPECT_THROW(causal.to_causal_4d(1, huge, huge, at::kFloat), c10::ValueError);
  EXPECT_THROW(make_causal_mask({1, 2, 3}, at::kFloat, at::kCPU), c10::ValueError);
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
