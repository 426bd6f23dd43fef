#include "ops/causal_mask.h"

#include <utility>

#include "ops/checks.h"
#include "ops/dtypes.h"
#include "ops/write_mask.h"

namespace attn_mask::ops {

bool needs_causal_mask(const c10::SymInt& q_length, const OptionalSymInt& sliding_window) {
  return sliding_window.has_value() || q_length > 1;
}

at::Tensor causal_mask(const char* op, const c10::SymInt& batch_size, const c10::SymInt& q_length,
                       const c10::SymInt& kv_length, at::ScalarType dtype,
                       std::optional<at::Device> device, const OptionalSymInt& sliding_window,
                       const Output& output) {
  check_addressable(op, {batch_size, q_length, kv_length}, dtype);
  const c10::SymInt planes = output.is_given() ? batch_size : c10::SymInt(1);
  const at::Tensor mask = output.mask(planes, 1, q_length, kv_length, dtype, device);
  if (!mask.is_meta()) {
    MaskTask task{};
    set_output(task, mask, additive_format(dtype));
    narrow_to_causal(task.rule, sliding_window);
    task.q_positions.offset = kv_length.expect_int() - q_length.expect_int();
    run(task, mask.device());
  }
  return output.is_given() ? mask : with_batch_of(mask, batch_size);
}

namespace {

std::optional<at::Tensor> to_causal_4d(const char* op, const c10::SymInt& batch_size,
                                       const c10::SymInt& query_length,
                                       const c10::SymInt& key_value_length, at::ScalarType dtype,
                                       std::optional<at::Device> device,
                                       const OptionalSymInt& sliding_window, const Output& output) {
  check_sliding_window(sliding_window);
  check_additive_dtype(op, "dtype", dtype);
  check_size(op, "batch_size", batch_size);
  check_size(op, "query_length", query_length);
  ATTN_MASK_CHECK_SYM_VALUE(key_value_length.sym_ge(query_length), op,
                            ": expected key_value_length to be at least query_length, which is ",
                            query_length, ", but got ", key_value_length);
  if (!output.is_given() && !needs_causal_mask(query_length, sliding_window)) {
    return std::nullopt;
  }
  return causal_mask(op, batch_size, query_length, key_value_length, dtype, device, sliding_window,
                     output);
}

at::Tensor make_causal_mask(const char* op, c10::SymIntArrayRef input_ids_shape,
                            const c10::SymInt& past_key_values_length,
                            const OptionalSymInt& sliding_window, at::ScalarType dtype,
                            std::optional<at::Device> device, const Output& output) {
  check_sliding_window(sliding_window);
  check_additive_dtype(op, "dtype", dtype);
  const InputShape shape = check_input_shape(op, "input_ids_shape", input_ids_shape);
  const c10::SymInt kv_length = check_kv_length(op, shape.q_length, past_key_values_length);
  return causal_mask(op, shape.batch_size, shape.q_length, kv_length, dtype, device, sliding_window,
                     output);
}

std::optional<at::Tensor> create_4d_causal_attention_mask(
    const char* op, c10::SymIntArrayRef input_shape, const c10::SymInt& past_key_values_length,
    const OptionalSymInt& sliding_window, at::ScalarType dtype, std::optional<at::Device> device,
    const Output& output) {
  check_sliding_window(sliding_window);
  check_additive_dtype(op, "dtype", dtype);
  const InputShape shape = check_input_shape(op, "input_shape", input_shape);
  const c10::SymInt kv_length = check_kv_length(op, shape.q_length, past_key_values_length);
  if (!output.is_given() && !needs_causal_mask(shape.q_length, sliding_window)) {
    return std::nullopt;
  }
  return causal_mask(op, shape.batch_size, shape.q_length, kv_length, dtype, device, sliding_window,
                     output);
}

constexpr auto kToCausal4d = "to_causal_4d";
constexpr auto kMakeCausalMask = "_make_causal_mask";
constexpr auto kCreate4dCausal = "_create_4d_causal_attention_mask";

}  // namespace

std::optional<at::Tensor> to_causal_4d(c10::SymInt batch_size, c10::SymInt query_length,
                                       c10::SymInt key_value_length, at::ScalarType dtype,
                                       std::optional<at::Device> device,
                                       OptionalSymInt sliding_window, c10::SymInt stride_multiple) {
  return to_causal_4d(kToCausal4d, batch_size, query_length, key_value_length, dtype, device,
                      sliding_window, Output(kToCausal4d, std::move(stride_multiple)));
}

void to_causal_4d_out(c10::SymInt batch_size, c10::SymInt query_length,
                      c10::SymInt key_value_length, std::optional<at::ScalarType> dtype,
                      std::optional<at::Device> device, OptionalSymInt sliding_window,
                      const at::Tensor& out) {
  const Output output(kToCausal4d, out, {});
  to_causal_4d(kToCausal4d, batch_size, query_length, key_value_length, output.dtype(dtype),
               output.device(device), sliding_window, output);
}

at::Tensor make_causal_mask(c10::SymIntArrayRef input_ids_shape, c10::SymInt past_key_values_length,
                            OptionalSymInt sliding_window, at::ScalarType dtype,
                            std::optional<at::Device> device, c10::SymInt stride_multiple) {
  return make_causal_mask(kMakeCausalMask, input_ids_shape, past_key_values_length, sliding_window,
                          dtype, device, Output(kMakeCausalMask, std::move(stride_multiple)));
}

void make_causal_mask_out(c10::SymIntArrayRef input_ids_shape, c10::SymInt past_key_values_length,
                          OptionalSymInt sliding_window, std::optional<at::ScalarType> dtype,
                          std::optional<at::Device> device, const at::Tensor& out) {
  const Output output(kMakeCausalMask, out, {});
  make_causal_mask(kMakeCausalMask, input_ids_shape, past_key_values_length, sliding_window,
                   output.dtype(dtype), output.device(device), output);
}

std::optional<at::Tensor> create_4d_causal_attention_mask(c10::SymIntArrayRef input_shape,
                                                          c10::SymInt past_key_values_length,
                                                          OptionalSymInt sliding_window,
                                                          at::ScalarType dtype,
                                                          std::optional<at::Device> device,
                                                          c10::SymInt stride_multiple) {
  return create_4d_causal_attention_mask(kCreate4dCausal, input_shape, past_key_values_length,
                                         sliding_window, dtype, device,
                                         Output(kCreate4dCausal, std::move(stride_multiple)));
}

void create_4d_causal_attention_mask_out(c10::SymIntArrayRef input_shape,
                                         c10::SymInt past_key_values_length,
                                         OptionalSymInt sliding_window,
                                         std::optional<at::ScalarType> dtype,
                                         std::optional<at::Device> device, const at::Tensor& out) {
  const Output output(kCreate4dCausal, out, {});
  create_4d_causal_attention_mask(kCreate4dCausal, input_shape, past_key_values_length,
                                  sliding_window, output.dtype(dtype), output.device(device),
                                  output);
}

}  // namespace attn_mask::ops
