#include "ops/padding_mask.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <utility>

#include "ops/checks.h"
#include "ops/dtypes.h"
#include "ops/kernels.h"
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
                           const std::optional<c10::SymInt>& sliding_window, bool unmask_unattended,
                           const Output& output) {
  check_sliding_window(sliding_window);
  check_additive_dtype(op, "dtype", dtype);
  check_rank(op, argument, mask, 2, "[batch_size, kv_length]");
  check_mask_dtype(op, argument, mask);
  check_size(op, "query_length", q_length);
  const c10::SymInt& mask_length = mask.sym_size(1);
  TORCH_CHECK_NOT_IMPLEMENTED(is_causal || !sliding_window,
                              "Sliding window is currently only implemented for causal masking");
  // One query without a window attends to all keys that the mask has, however many those are. Of a
  // length that only a compiled run will tell, the general case writes the same.
  const bool causal = is_causal && (sliding_window || TORCH_GUARD_OR_TRUE(q_length.sym_gt(1)));
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
  at::Tensor out = output.mask(mask.sym_size(0), 1, q_length, mask_length, dtype, mask.device());
  if (out.is_meta()) {
    return out;
  }
  MaskTask task{};
  set_output(task, out, additive_format(dtype));
  if (causal) {
    narrow_to_causal(task.rule, sliding_window);
    task.q_positions.offset = task.kv_length - task.q_length;
  }
  narrow(task.rule, padding_of(mask, dtype));
  prepare_and_run(task, out.device(),
                  unmask_unattended ? std::optional(sign_bit(dtype)) : std::nullopt);
  return out;
}

namespace ops {
namespace {

constexpr auto kTo4d = "to_4d";
constexpr auto kExpandMask = "_expand_mask";
constexpr auto kPrepare4d = "_prepare_4d_attention_mask";
constexpr auto kPrepare4dForSdpa = "_prepare_4d_attention_mask_for_sdpa";

at::Tensor expand(const char* op, const at::Tensor& mask, const OptionalSymInt& tgt_len,
                  at::ScalarType dtype, const Output& output) {
  check_rank(op, "mask", mask, 2, "[batch_size, kv_length]");
  if (tgt_len) {
    check_size(op, "tgt_len", *tgt_len);
  }
  return padding_mask_4d(op, "mask", mask, tgt_len.value_or(mask.sym_size(1)), dtype, std::nullopt,
                         /*is_causal=*/false, std::nullopt, /*unmask_unattended=*/false, output);
}

}  // namespace

at::Tensor to_4d(const at::Tensor& attention_mask_2d, c10::SymInt query_length,
                 at::ScalarType dtype, OptionalSymInt key_value_length, bool is_causal,
                 OptionalSymInt sliding_window, bool unmask_unattended,
                 c10::SymInt stride_multiple) {
  return padding_mask_4d(kTo4d, "attention_mask_2d", attention_mask_2d, query_length, dtype,
                         key_value_length, is_causal, sliding_window, unmask_unattended,
                         Output(kTo4d, std::move(stride_multiple)));
}

void to_4d_out(const at::Tensor& attention_mask_2d, c10::SymInt query_length,
               std::optional<at::ScalarType> dtype, OptionalSymInt key_value_length, bool is_causal,
               OptionalSymInt sliding_window, bool unmask_unattended, const at::Tensor& out) {
  const Output output(kTo4d, out, {attention_mask_2d});
  padding_mask_4d(kTo4d, "attention_mask_2d", attention_mask_2d, query_length, output.dtype(dtype),
                  key_value_length, is_causal, sliding_window, unmask_unattended, output);
}

at::Tensor expand_mask(const at::Tensor& mask, OptionalSymInt tgt_len, at::ScalarType dtype,
                       c10::SymInt stride_multiple) {
  return expand(kExpandMask, mask, tgt_len, dtype, Output(kExpandMask, std::move(stride_multiple)));
}

void expand_mask_out(const at::Tensor& mask, OptionalSymInt tgt_len,
                     std::optional<at::ScalarType> dtype, const at::Tensor& out) {
  const Output output(kExpandMask, out, {mask});
  expand(kExpandMask, mask, tgt_len, output.dtype(dtype), output);
}

at::Tensor prepare_4d_attention_mask(const at::Tensor& mask, OptionalSymInt tgt_len,
                                     at::ScalarType dtype, c10::SymInt stride_multiple) {
  return expand(kPrepare4d, mask, tgt_len, dtype, Output(kPrepare4d, std::move(stride_multiple)));
}

void prepare_4d_attention_mask_out(const at::Tensor& mask, OptionalSymInt tgt_len,
                                   std::optional<at::ScalarType> dtype, const at::Tensor& out) {
  const Output output(kPrepare4d, out, {mask});
  expand(kPrepare4d, mask, tgt_len, output.dtype(dtype), output);
}

std::optional<at::Tensor> prepare_4d_attention_mask_for_sdpa(const at::Tensor& mask,
                                                             OptionalSymInt tgt_len,
                                                             at::ScalarType dtype, bool allow_skip,
                                                             c10::SymInt stride_multiple) {
  const Output output(kPrepare4dForSdpa, std::move(stride_multiple));
  check_rank(kPrepare4dForSdpa, "mask", mask, 2, "[batch_size, kv_length]");
  if (allow_skip && is_all_ones(kPrepare4dForSdpa, "mask", mask)) {
    return std::nullopt;
  }
  return expand(kPrepare4dForSdpa, mask, tgt_len, dtype, output);
}

void prepare_4d_attention_mask_for_sdpa_out(const at::Tensor& mask, OptionalSymInt tgt_len,
                                            std::optional<at::ScalarType> dtype,
                                            bool /*allow_skip*/, const at::Tensor& out) {
  const Output output(kPrepare4dForSdpa, out, {mask});
  expand(kPrepare4dForSdpa, mask, tgt_len, output.dtype(dtype), output);
}

}  // namespace ops
}  // namespace attn_mask
