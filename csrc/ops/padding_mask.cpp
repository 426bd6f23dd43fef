#include "ops/padding_mask.h"

#include "ops/checks.h"
#include "ops/dtypes.h"
#include "ops/operators.h"
#include "ops/write_mask.h"

namespace attn_mask {
namespace {

Padding padding_of(const at::Tensor& mask, at::ScalarType cast_to) {
  return {mask.const_data_ptr(), mask.stride(0),
          /*head_stride=*/0,
          /*q_stride=*/0,        mask.stride(1),
          mask.size(1),          static_cast<int32_t>(mask.element_size()),
          /*by_column=*/false,   is_one(mask.scalar_type(), cast_to)};
}

}  // namespace

at::Tensor padding_mask_4d(const char* op, const char* argument, const at::Tensor& mask,
                           const c10::SymInt& q_length, at::ScalarType dtype,
                           const std::optional<c10::SymInt>& kv_length, bool is_causal,
                           const std::optional<c10::SymInt>& sliding_window) {
  check_sliding_window(sliding_window);
  check_additive_dtype(op, "dtype", dtype);
  check_rank(op, argument, mask, 2, "[batch_size, kv_length]");
  check_mask_dtype(op, argument, mask);
  check_size(op, "query_length", q_length);
  const c10::SymInt& mask_length = mask.sym_size(1);
  TORCH_CHECK_NOT_IMPLEMENTED(is_causal || !sliding_window,
                              "Sliding window is currently only implemented for causal masking");
  // One query without a window attends to all keys that the mask has, however many those are.
  const bool causal = is_causal && (sliding_window || q_length > 1);
  if (causal) {
    TORCH_CHECK_VALUE(kv_length.has_value(),
                      "This attention mask converter is causal. Make sure to pass "
                      "`key_value_length` to correctly create a causal mask.");
    ATTN_MASK_CHECK_SYM_VALUE(kv_length->sym_ge(q_length), op,
                              ": expected key_value_length to be at least query_length, which is ",
                              q_length, ", but got ", *kv_length);
    ATTN_MASK_CHECK_SYM_VALUE(mask_length.sym_eq(*kv_length), op, ": expected ", argument,
                              " to be 2-D [batch_size, kv_length] with kv_length ", *kv_length,
                              ", but got ", describe_sizes(mask));
  } else if (kv_length) {
    check_size(op, "key_value_length", *kv_length);
  }
  at::Tensor out = empty_mask(op, mask.sym_size(0), 1, q_length, mask_length, dtype, mask.device());
  if (!out.is_meta()) {
    Rule rule = make_rule(padding_of(mask, dtype));
    if (causal) {
      rule = causal_rule(sliding_window) & rule;
    }
    write_mask(out, rule, causal ? out.size(3) - out.size(2) : 0, additive_format(dtype));
  }
  return out;
}

namespace ops {

at::Tensor to_4d(const at::Tensor& attention_mask_2d, c10::SymInt query_length,
                 at::ScalarType dtype, OptionalSymInt key_value_length, bool is_causal,
                 OptionalSymInt sliding_window) {
  return padding_mask_4d("to_4d", "attention_mask_2d", attention_mask_2d, query_length, dtype,
                         key_value_length, is_causal, sliding_window);
}

namespace {

at::Tensor expand(const char* op, const at::Tensor& mask, const OptionalSymInt& tgt_len,
                  at::ScalarType dtype) {
  check_rank(op, "mask", mask, 2, "[batch_size, kv_length]");
  if (tgt_len) {
    check_size(op, "tgt_len", *tgt_len);
  }
  return padding_mask_4d(op, "mask", mask, tgt_len.value_or(mask.sym_size(1)), dtype, std::nullopt,
                         /*is_causal=*/false, std::nullopt);
}

}  // namespace

at::Tensor expand_mask(const at::Tensor& mask, OptionalSymInt tgt_len, at::ScalarType dtype) {
  return expand("_expand_mask", mask, tgt_len, dtype);
}

at::Tensor prepare_4d_attention_mask(const at::Tensor& mask, OptionalSymInt tgt_len,
                                     at::ScalarType dtype) {
  return expand("_prepare_4d_attention_mask", mask, tgt_len, dtype);
}

std::optional<at::Tensor> prepare_4d_attention_mask_for_sdpa(const at::Tensor& mask,
                                                             OptionalSymInt tgt_len,
                                                             at::ScalarType dtype,
                                                             bool allow_skip) {
  static constexpr auto kOp = "_prepare_4d_attention_mask_for_sdpa";
  check_rank(kOp, "mask", mask, 2, "[batch_size, kv_length]");
  if (allow_skip && is_all_ones(kOp, "mask", mask)) {
    return std::nullopt;
  }
  return expand(kOp, mask, tgt_len, dtype);
}

}  // namespace ops
}  // namespace attn_mask
