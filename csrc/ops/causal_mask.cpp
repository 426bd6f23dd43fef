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

std::optional<at::Tensor> ToCausal4d::run(const Output& output, const Given& given) {
  const char* const op = output.op();
  const c10::SymInt& q_length = given.get<"query_length">();
  const c10::SymInt& kv_length = given.get<"key_value_length">();
  check_sliding_window(given.get<"sliding_window">());
  check_additive_dtype(op, "dtype", given.get<"dtype">());
  check_size(op, "batch_size", given.get<"batch_size">());
  check_size(op, "query_length", q_length);
  ATTN_MASK_CHECK_SYM_VALUE(kv_length.sym_ge(q_length), op,
                            ": expected key_value_length to be at least query_length, which is ",
                            q_length, ", but got ", kv_length);
  return causal_mask_if_needed(output, given.get<"batch_size">(), q_length, kv_length,
                               given.get<"dtype">(), given.get<"device">(),
                               given.get<"sliding_window">());
}

namespace {

/// The mask of an operator that is given a shape and a past: `make` is one of the two above.
template <typename Make, typename Given>
auto causal_mask_of(Make make, const char* argument, c10::SymIntArrayRef input_shape,
                    const Output& output, const Given& given) {
  const OptionalSymInt& sliding_window = given.template get<"sliding_window">();
  const at::ScalarType dtype = given.template get<"dtype">();
  check_sliding_window(sliding_window);
  check_additive_dtype(output.op(), "dtype", dtype);
  const InputShape shape = check_input_shape(output.op(), argument, input_shape);
  const c10::SymInt kv_length =
      check_kv_length(output.op(), shape.q_length, given.template get<"past_key_values_length">());
  return make(output, shape.batch_size, shape.q_length, kv_length, dtype,
              given.template get<"device">(), sliding_window);
}

}  // namespace

at::Tensor MakeCausalMask::run(const Output& output, const Given& given) {
  return causal_mask_of(&causal_mask, "input_ids_shape", given.get<"input_ids_shape">(), output,
                        given);
}

std::optional<at::Tensor> Create4dCausalAttentionMask::run(const Output& output,
                                                           const Given& given) {
  return causal_mask_of(&causal_mask_if_needed, "input_shape", given.get<"input_shape">(), output,
                        given);
}

}  // namespace attn_mask::ops
