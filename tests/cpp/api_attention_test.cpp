// Attention by a rule in C++, compared with a softmax in float64 over the mask of the rule.

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <limits>
#include <vector>

#include "attn_mask/attn_mask.h"
#include "masks.h"

namespace attn_mask {
namespace {

using test::text_of;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Inputs {
  at::Tensor query = at::randn({2, 4, 40, 8}).requires_grad_();
  at::Tensor key = at::randn({2, 2, 40, 8}).requires_grad_();
  at::Tensor value = at::randn({2, 2, 40, 8}).requires_grad_();
};

at::Tensor softmax_in_float64(const Inputs& inputs, const at::Tensor& visible) {
  const at::Tensor key = inputs.key.repeat_interleave(2, 1).to(at::kDouble);
  const at::Tensor value = inputs.value.repeat_interleave(2, 1).to(at::kDouble);
  const at::Tensor scores =
      at::matmul(inputs.query.to(at::kDouble), key.transpose(-1, -2)).div(std::sqrt(8.0));
  return at::matmul(at::softmax(scores.masked_fill(visible.logical_not(), -kInfinity), -1), value);
}

double distance(const at::Tensor& a, const at::Tensor& b) {
  return a.to(at::kDouble).sub(b.to(at::kDouble)).abs().max().item<double>();
}

TEST(Attention, IsTheSoftmaxOfTheRule) {
  at::manual_seed(0);
  const at::Tensor ids = at::arange(40).floor_divide(13);
  for (const MaskRule& rule : {causal(), causal() & sliding_window(7), causal() & documents(ids)}) {
    const Inputs inputs;
    const Attention got = scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, rule,
                                                       {.enable_gqa = true});
    const at::Tensor want = softmax_in_float64(inputs, boolean(rule, 2, 40, 40));
    EXPECT_LT(distance(got.out, want), 2e-5);
    EXPECT_EQ(got.log_sum_exp.sizes(), (std::vector<int64_t>{2, 4, 40}));
    const std::vector<at::Tensor> tensors{inputs.query, inputs.key, inputs.value};
    const auto of_got = torch::autograd::grad({got.out.sum()}, tensors);
    const auto of_want = torch::autograd::grad({want.sum()}, tensors);
    for (size_t i = 0; i < tensors.size(); ++i) {
      EXPECT_LT(distance(of_got[i], of_want[i]), 1e-4);
    }
  }
}

TEST(Attention, TheLogSumExpHasAGradient) {
  at::manual_seed(0);
  const at::Tensor query = at::randn({1, 2, 9, 8}, at::kDouble).requires_grad_();
  const at::Tensor key = at::randn({1, 2, 9, 8}, at::kDouble).requires_grad_();
  const at::Tensor got =
      scaled_dot_product_attention(query, key, key.detach(), causal()).log_sum_exp;
  const at::Tensor want = at::matmul(query, key.transpose(-1, -2))
                              .div(std::sqrt(8.0))
                              .masked_fill(boolean(causal(), 1, 9, 9).logical_not(), -kInfinity)
                              .logsumexp(-1);
  const auto of_got = torch::autograd::grad({got.sin().sum()}, {query, key});
  const auto of_want = torch::autograd::grad({want.sin().sum()}, {query, key});
  EXPECT_LT(distance(of_got[0], of_want[0]), 1e-12);
  EXPECT_LT(distance(of_got[1], of_want[1]), 1e-12);
}

TEST(Attention, CountsPositionsFromTheLastKey) {
  const Inputs inputs;
  const at::Tensor last = inputs.query.narrow(2, 39, 1);
  const auto attend = [&](const AttentionOptions& options) {
    return scaled_dot_product_attention(last, inputs.key, inputs.value, causal(), options).out;
  };
  EXPECT_TRUE(attend({.enable_gqa = true}).equal(attend({.enable_gqa = true, .q_offset = 39})));
  EXPECT_FALSE(attend({.enable_gqa = true}).equal(attend({.enable_gqa = true, .q_offset = 9})));
}

TEST(Attention, RowsWithoutKeysAreZero) {
  const Inputs inputs;
  const Attention got = scaled_dot_product_attention(inputs.query, inputs.key, inputs.value,
                                                     nothing(), {.enable_gqa = true});
  EXPECT_FALSE(got.out.any().item<bool>());
  EXPECT_TRUE(got.log_sum_exp.eq(-kInfinity).all().item<bool>());
}

TEST(Attention, RefusesWhatDoesNotFit) {
  const Inputs inputs;
  const auto attend = [&](const at::Tensor& query, const at::Tensor& value) {
    scaled_dot_product_attention(query, inputs.key, value, causal());
  };
  EXPECT_EQ(
      text_of<c10::ValueError>([&] { attend(inputs.query, inputs.value); }),
      "scaled_dot_product_attention: expected key to have the heads of query, which are 4 (or "
      "fewer, with enable_gqa), but got 4-D [2, 2, 40, 8]");
  EXPECT_EQ(
      text_of<c10::TypeError>([&] { attend(at::Tensor(), inputs.value); }),
      "scaled_dot_product_attention: expected query to be a tensor, but got an undefined one");
  EXPECT_EQ(
      text_of<c10::TypeError>([&] { attend(inputs.query, at::Tensor()); }),
      "scaled_dot_product_attention: expected value to be a tensor, but got an undefined one");
  // A table that was not grown with the cache.
  EXPECT_EQ(text_of<c10::ValueError>([&] {
              scaled_dot_product_attention(inputs.query.narrow(2, 0, 1), inputs.key, inputs.value,
                                           documents(at::zeros({39}, at::kLong)),
                                           {.enable_gqa = true});
            }),
            "documents: expected ids to be of length 40 or longer, for the queries of "
            "scaled_dot_product_attention, but got [1, 39]");
}

}  // namespace
}  // namespace attn_mask
