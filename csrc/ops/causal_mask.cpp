#include "ops/checks.h"
#include "ops/dtypes.h"
#include "ops/operators.h"
#include "ops/write_mask.h"

namespace attn_mask::ops {
namespace {

/// One plane is written; the batch is a stride-0 expand of it, as upstream's.
at::Tensor causal_mask(const char* op, const c10::SymInt& batch_size, const c10::SymInt& q_length,
                       const c10::SymInt& kv_length, at::ScalarType dtype,
                       std::optional<at::Device> device, const OptionalSymInt& sliding_window) {
  check_addressable(op, {batch_size, q_length, kv_length}, dtype);
  const at::Tensor plane = empty_mask(op, 1, 1, q_length, kv_length, dtype, device);
  if (!plane.is_meta()) {
    const int64_t q_offset = kv_length.expect_int() - q_length.expect_int();
    write_mask(plane, causal_rule(sliding_window), q_offset, additive_format(dtype));
  }
  return plane.expand_symint({batch_size, 1, q_length, kv_length});
}

/// One query without a window attends to every key, which needs no mask.
bool needs_causal_mask(const c10::SymInt& q_length, const OptionalSymInt& sliding_window) {
  return sliding_window.has_value() || q_length > 1;
}

}  // namespace

std::optional<at::Tensor> to_causal_4d(c10::SymInt batch_size, c10::SymInt query_length,
                                       c10::SymInt key_value_length, at::ScalarType dtype,
                                       std::optional<at::Device> device,
                                       OptionalSymInt sliding_window) {
  static constexpr auto kOp = "to_causal_4d";
  check_sliding_window(sliding_window);
  check_additive_dtype(kOp, "dtype", dtype);
  check_size(kOp, "batch_size", batch_size);
  check_size(kOp, "query_length", query_length);
  ATTN_MASK_CHECK_SYM_VALUE(key_value_length.sym_ge(query_length), kOp,
                            ": expected key_value_length to be at least query_length, which is ",
                            query_length, ", but got ", key_value_length);
  if (!needs_causal_mask(query_length, sliding_window)) {
    return std::nullopt;
  }
  return causal_mask(kOp, batch_size, query_length, key_value_length, dtype, device,
                     sliding_window);
}

at::Tensor make_causal_mask(c10::SymIntArrayRef input_ids_shape, c10::SymInt past_key_values_length,
                            OptionalSymInt sliding_window, at::ScalarType dtype,
                            std::optional<at::Device> device) {
  static constexpr auto kOp = "_make_causal_mask";
  check_sliding_window(sliding_window);
  check_additive_dtype(kOp, "dtype", dtype);
  const InputShape shape = check_input_shape(kOp, "input_ids_shape", input_ids_shape);
  const c10::SymInt kv_length = check_kv_length(kOp, shape.q_length, past_key_values_length);
  return causal_mask(kOp, shape.batch_size, shape.q_length, kv_length, dtype, device,
                     sliding_window);
}

std::optional<at::Tensor> create_4d_causal_attention_mask(c10::SymIntArrayRef input_shape,
                                                          c10::SymInt past_key_values_length,
                                                          OptionalSymInt sliding_window,
                                                          at::ScalarType dtype,
                                                          std::optional<at::Device> device) {
  static constexpr auto kOp = "_create_4d_causal_attention_mask";
  check_sliding_window(sliding_window);
  check_additive_dtype(kOp, "dtype", dtype);
  const InputShape shape = check_input_shape(kOp, "input_shape", input_shape);
  const c10::SymInt kv_length = check_kv_length(kOp, shape.q_length, past_key_values_length);
  if (!needs_causal_mask(shape.q_length, sliding_window)) {
    return std::nullopt;
  }
  return causal_mask(kOp, shape.batch_size, shape.q_length, kv_length, dtype, device,
                     sliding_window);
}

}  // namespace attn_mask::ops
