#include "ops/causal_mask.h"

#include <utility>

#include "ops/core/checks.h"
#include "ops/core/dtypes.h"
#include "ops/core/write_mask.h"
#include "ops/sdpa_decision.h"

namespace attn_mask::ops {

at::Tensor causal_mask(const Output& output, const c10::SymInt& batch_size,
                       const c10::SymInt& q_length, const c10::SymInt& kv_length,
                       at::ScalarType dtype, std::optional<at::Device> device,
                       const OptionalSymInt& sliding_window) {
  check_addressable(output.op(), {batch_size, q_length, kv_length}, dtype);
  const c10::SymInt planes = output.is_given() ? batch_size : c10::SymInt(1);
  const at::Tensor mask = output.mask(planes, 1, q_length, kv_length, dtype, device);
  if (!mask.is_meta()) {
    MaskParams params{};
    set_output(params, mask, additive_format(dtype));
    narrow_to_causal(params.rule, sliding_window);
    params.q_positions.offset = kv_length.expect_int() - q_length.expect_int();
    run(params, mask.device());
  }
  return output.is_given() ? mask : with_batch_of(mask, batch_size);
}

std::optional<at::Tensor> causal_mask_if_needed(const Output& output, const c10::SymInt& batch_size,
                                                const c10::SymInt& q_length,
                                                const c10::SymInt& kv_length, at::ScalarType dtype,
                                                std::optional<at::Device> device,
                                                const OptionalSymInt& sliding_window) {
  if (!output.is_given() && !needs_causal_mask(q_length, sliding_window)) {
    return std::nullopt;
  }
  return causal_mask(output, batch_size, q_length, kv_length, dtype, device, sliding_window);
}

std::optional<at::Tensor> ToCausal4d::run(const Output& output, c10::SymInt batch_size,
                                          c10::SymInt query_length, c10::SymInt key_value_length,
                                          at::ScalarType dtype, std::optional<at::Device> device,
                                          OptionalSymInt sliding_window) {
  const char* const op = output.op();
  check_sliding_window(sliding_window);
  check_additive_dtype(op, "dtype", dtype);
  check_size(op, "batch_size", batch_size);
  check_size(op, "query_length", query_length);
  ATTN_MASK_CHECK_SYM_VALUE(key_value_length.sym_ge(query_length), op,
                            ": expected key_value_length to be at least query_length, which is ",
                            query_length, ", but got ", key_value_length);
  return causal_mask_if_needed(output, batch_size, query_length, key_value_length, dtype, device,
                               sliding_window);
}

at::Tensor MakeCausalMask::run(const Output& output, c10::SymIntArrayRef input_ids_shape,
                               c10::SymInt past_key_values_length, OptionalSymInt sliding_window,
                               at::ScalarType dtype, std::optional<at::Device> device) {
  check_sliding_window(sliding_window);
  check_additive_dtype(output.op(), "dtype", dtype);
  const InputShape shape = check_input_shape(output.op(), "input_ids_shape", input_ids_shape);
  const c10::SymInt kv_length =
      check_kv_length(output.op(), shape.q_length, past_key_values_length);
  return causal_mask(output, shape.batch_size, shape.q_length, kv_length, dtype, device,
                     sliding_window);
}

std::optional<at::Tensor> Create4dCausalAttentionMask::run(
    const Output& output, c10::SymIntArrayRef input_shape, c10::SymInt past_key_values_length,
    OptionalSymInt sliding_window, at::ScalarType dtype, std::optional<at::Device> device) {
  check_sliding_window(sliding_window);
  check_additive_dtype(output.op(), "dtype", dtype);
  const InputShape shape = check_input_shape(output.op(), "input_shape", input_shape);
  const c10::SymInt kv_length =
      check_kv_length(output.op(), shape.q_length, past_key_values_length);
  return causal_mask_if_needed(output, shape.batch_size, shape.q_length, kv_length, dtype, device,
                               sliding_window);
}

}  // namespace attn_mask::ops
