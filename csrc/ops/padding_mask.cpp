#include "ops/padding_mask.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include "ops/core/checks.h"
#include "ops/core/device_kernels.h"
#include "ops/core/dtypes.h"
#include "ops/core/operators.h"
#include "ops/core/write_mask.h"
#include "ops/sdpa_decision.h"

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

at::Tensor padding_mask_4d(const Output& output, const char* argument, const at::Tensor& mask,
                           const OfQueries& queries, at::ScalarType dtype, bool unmask_unattended) {
  const char* const op = output.op();
  const auto& [q_length, kv_length, is_causal, sliding_window] = queries;
  check_sliding_window(sliding_window);
  check_additive_dtype(op, "dtype", dtype);
  check_rank(op, argument, mask, 2, "[batch_size, kv_length]");
  check_mask_dtype(op, argument, mask);
  check_size(op, "query_length", q_length);
  const c10::SymInt& mask_length = mask.sym_size(1);
  TORCH_CHECK_NOT_IMPLEMENTED(is_causal || !sliding_window,
                              "Sliding window is currently only implemented for causal masking");
  // One query without a window attends to all keys that the mask has, however many those are. Of a
  // length that only a compiled run decides, the general case writes the same.
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
  MaskParams params{};
  set_output(params, out, additive_format(dtype));
  if (causal) {
    narrow_to_causal(params.rule, sliding_window);
    params.q_positions.offset = params.kv_length - params.q_length;
  }
  narrow(params.rule, padding_of(mask, dtype));
  prepare_and_run(params, out.device(),
                  unmask_unattended ? std::optional(sign_bit(dtype)) : std::nullopt);
  return out;
}

namespace ops {
namespace {

template <typename Given>
at::Tensor expand(const Output& output, const Given& given) {
  const at::Tensor& mask = given.template get<"mask">();
  const OptionalSymInt& tgt_len = given.template get<"tgt_len">();
  check_rank(output.op(), "mask", mask, 2, "[batch_size, kv_length]");
  if (tgt_len) {
    check_size(output.op(), "tgt_len", *tgt_len);
  }
  return padding_mask_4d(
      output, "mask", mask,
      {tgt_len.value_or(mask.sym_size(1)), std::nullopt, /*is_causal=*/false, std::nullopt},
      given.template get<"dtype">(), /*unmask_unattended=*/false);
}

}  // namespace

at::Tensor To4d::run(const Output& output, const Given& given) {
  return padding_mask_4d(output, "attention_mask_2d", given.get<"attention_mask_2d">(),
                         {given.get<"query_length">(), given.get<"key_value_length">(),
                          given.get<"is_causal">(), given.get<"sliding_window">()},
                         given.get<"dtype">(), given.get<"unmask_unattended">());
}

at::Tensor ExpandMask::run(const Output& output, const Given& given) {
  return expand(output, given);
}

at::Tensor Prepare4dAttentionMask::run(const Output& output, const Given& given) {
  return expand(output, given);
}

std::optional<at::Tensor> Prepare4dAttentionMaskForSdpa::run(const Output& output,
                                                             const Given& given) {
  const at::Tensor& mask = given.get<"mask">();
  check_rank(output.op(), "mask", mask, 2, "[batch_size, kv_length]");
  if (!output.is_given() && given.get<"allow_skip">() && is_all_ones(output.op(), "mask", mask)) {
    return std::nullopt;
  }
  return expand(output, given);
}

}  // namespace ops
}  // namespace attn_mask
