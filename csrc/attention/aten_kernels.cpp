#include "attention/aten_kernels.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace attn_mask {
namespace {

// Matrix products hold scores: of so many bytes at once.
constexpr int64_t kScoreBytes = int64_t{16} << 20;

bool takes_flash(const at::Tensor& query, const at::Tensor& value) {
  return query.is_cpu() && query.size(3) == value.size(3) && query.size(3) > 0;
}

/// Whether a GPU's memory-efficient kernel takes these widths.
bool takes_efficient(const at::Tensor& query, const at::Tensor& value) {
  return query.is_cuda() && query.scalar_type() != at::kDouble && query.size(3) == value.size(3) &&
         query.size(3) > 0 && query.size(3) % 8 == 0;
}

// What that kernel pads the queries of a log-sum-exp to.
constexpr int64_t kEfficientRows = 32;

/// One head of keys for each of queries.
at::Tensor repeated(const at::Tensor& of_keys, const at::Tensor& query) {
  const int64_t times = query.size(1) / of_keys.size(1);
  return times == 1 ? of_keys : of_keys.repeat_interleave(times, 1, query.size(1));
}

std::optional<at::Tensor> expanded(const std::optional<at::Tensor>& mask, const at::Tensor& query) {
  return mask ? std::optional(mask->expand({query.size(0), query.size(1), -1, -1})) : std::nullopt;
}

/// A tile in matrix products, some rows at a time. Heads are grouped by the key heads that they
/// share: [b, key heads, group, rows, ...].
class Products {
 public:
  explicit Products(const AttentionTile& tile)
      : dtype_(tile.query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat),
        key_heads_(tile.key.size(1)),
        is_causal_(tile.is_causal),
        query_(grouped(tile.query)),
        key_(tile.key.to(dtype_).unsqueeze(2)),
        value_(tile.value.to(dtype_).unsqueeze(2)),
        mask_(tile.mask),
        scale_(tile.scale.value_or(
            1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(tile.query.size(3), 1))))) {}

  at::Tensor grouped(const at::Tensor& tensor) const {
    return tensor.unflatten(1, {key_heads_, tensor.size(1) / key_heads_});
  }

  int64_t rows() const { return query_.size(3); }
  int64_t height() const {
    const int64_t of_row = query_.size(0) * query_.size(1) * query_.size(2) * key_.size(3) * 4;
    return std::max<int64_t>(1, kScoreBytes / std::max<int64_t>(1, of_row));
  }

  const at::Tensor& key() const { return key_; }
  const at::Tensor& value() const { return value_; }
  double scale() const { return scale_; }
  at::ScalarType dtype() const { return dtype_; }

  at::Tensor query_of(int64_t first, int64_t count) const { return part(query_, first, count); }
  at::Tensor part(const at::Tensor& tensor, int64_t first, int64_t count) const {
    return tensor.narrow(3, first, count).to(dtype_);
  }

  at::Tensor scores(int64_t first, int64_t count) const {
    at::Tensor scores = at::matmul(query_of(first, count), key_.transpose(-1, -2)).mul_(scale_);
    if (mask_) {
      const at::Tensor of_rows = mask_->narrow(2, first, count).to(dtype_);
      scores.add_(mask_->size(1) == 1 ? of_rows.unsqueeze(1) : grouped(of_rows));
    }
    if (is_causal_) {
      const at::Tensor later =
          at::ones({count, key_.size(3)}, scores.options().dtype(at::kBool)).triu_(first + 1);
      scores.masked_fill_(later, -std::numeric_limits<double>::infinity());
    }
    return scores;
  }

 private:
  at::ScalarType dtype_;
  int64_t key_heads_;
  bool is_causal_;
  at::Tensor query_;
  at::Tensor key_;
  at::Tensor value_;
  std::optional<at::Tensor> mask_;
  double scale_;
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> attend(const AttentionTile& tile) {
  const auto& [query, key, value, is_causal, mask, scale] = tile;
  if (takes_flash(query, value)) {
    return at::_scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, mask,
                                                           scale);
  }
  if (takes_efficient(query, value)) {
    auto [out, lse, seed, offset] = at::_scaled_dot_product_efficient_attention(
        query, repeated(key, query), repeated(value, query), expanded(mask, query),
        /*compute_log_sumexp=*/true, 0.0, is_causal, scale);
    return {out, lse.narrow(2, 0, query.size(2))};
  }
  const Products products(tile);
  const at::Tensor out =
      at::empty({query.size(0), query.size(2), query.size(1), value.size(3)}, query.options())
          .transpose(1, 2);
  const at::Tensor lse = at::empty({query.size(0), query.size(2), query.size(1)},
                                   query.options().dtype(products.dtype()))
                             .transpose(1, 2);
  for (int64_t first = 0; first < products.rows(); first += products.height()) {
    const int64_t count = std::min(products.height(), products.rows() - first);
    const at::Tensor scores = products.scores(first, count);
    at::Tensor of_rows = scores.logsumexp({-1}, /*keepdim=*/true);
    of_rows.masked_fill_(of_rows.eq(-std::numeric_limits<double>::infinity()), 0);
    const at::Tensor weights = scores.sub(of_rows).exp_();
    out.narrow(2, first, count).copy_(at::matmul(weights, products.value()).flatten(1, 2));
    lse.narrow(2, first, count).copy_(of_rows.squeeze(-1).flatten(1, 2));
  }
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attend_backward(const AttentionTile& tile,
                                                               const at::Tensor& out,
                                                               const at::Tensor& lse,
                                                               const at::Tensor& grad_out) {
  const auto& [query, key, value, is_causal, mask, scale] = tile;
  if (takes_flash(query, value)) {
    return at::_scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, query, key, value, out, lse, 0.0, is_causal, mask, scale);
  }
  if (takes_efficient(query, value)) {
    const int64_t missing = (kEfficientRows - query.size(2) % kEfficientRows) % kEfficientRows;
    const at::Tensor padded = at::constant_pad_nd(lse.contiguous(), {0, missing},
                                                  std::numeric_limits<double>::infinity());
    const at::Tensor state = at::zeros({}, query.options().dtype(at::kLong));
    // For 16-bit dtypes it takes the strides of the result to be these, whatever they are.
    const at::Tensor by_length = out.transpose(1, 2).contiguous().transpose(1, 2);
    auto [of_query, of_key, of_value, of_mask] =
        at::_scaled_dot_product_efficient_attention_backward(
            grad_out, query, repeated(key, query), repeated(value, query),
            expanded(mask, query).value_or(at::Tensor()), by_length, padded, state, state, 0.0,
            {true, true, true, false}, is_causal, scale);
    const auto summed = [&, heads = key.size(1),
                         times = query.size(1) / key.size(1)](const at::Tensor& of_heads) {
      return times == 1 ? of_heads
                        : of_heads.unflatten(1, {heads, times})
                              .sum(2, /*keepdim=*/false, lse.scalar_type());
    };
    return {of_query, summed(of_key), summed(of_value)};
  }
  const Products products(tile);
  const at::Tensor of_query = at::empty(query.sizes(), query.options());
  at::Tensor of_key = at::zeros_like(products.key());
  at::Tensor of_value = at::zeros_like(products.value());
  for (int64_t first = 0; first < products.rows(); first += products.height()) {
    const int64_t count = std::min(products.height(), products.rows() - first);
    const at::Tensor grad = products.part(products.grouped(grad_out), first, count);
    const at::Tensor of_out = products.part(products.grouped(out), first, count);
    const at::Tensor of_lse = products.grouped(lse).narrow(3, first, count).unsqueeze(-1);
    const at::Tensor weights = products.scores(first, count).sub_(of_lse).exp_();
    of_value.add_(at::matmul(weights.transpose(-1, -2), grad).sum(2, /*keepdim=*/true));
    at::Tensor of_scores = at::matmul(grad, products.value().transpose(-1, -2));
    of_scores.sub_(grad.mul(of_out).sum(-1, /*keepdim=*/true)).mul_(weights).mul_(products.scale());
    of_query.narrow(2, first, count).copy_(at::matmul(of_scores, products.key()).flatten(1, 2));
    of_key.add_(at::matmul(of_scores.transpose(-1, -2), products.query_of(first, count))
                    .sum(2, /*keepdim=*/true));
  }
  return {of_query, of_key.squeeze(2), of_value.squeeze(2)};
}

}  // namespace attn_mask
