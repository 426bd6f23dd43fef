// The masks of transformers' modeling_attn_mask_utils: causality, one padding mask, and a mask
// whose rows without a key are unmasked.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/where.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/GradMode.h>

#include <array>
#include <optional>

#include "ops/core/call.h"
#include "ops/core/checks.h"
#include "ops/core/device_kernels.h"
#include "ops/core/dtypes.h"
#include "ops/core/few_dimensions.h"
#include "ops/core/operators.h"
#include "ops/core/output.h"
#include "ops/core/rule_program.h"
#include "ops/core/write_mask.h"
#include "ops/sdpa_decision.h"

namespace attn_mask::ops {
namespace {

/// The additive mask of causality (and window) alone. Of a new tensor one plane is written, and the
/// batch is a stride-0 expand of it, as upstream's.
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

/// The same, and nothing where none is needed. A mask of the caller's is written whole, as it has
/// no way to say so.
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

/// What else than padding masks: causality with a window, where `is_causal`.
struct OfQueries {
  c10::SymInt q_length;
  std::optional<c10::SymInt> kv_length;
  bool is_causal;
  std::optional<c10::SymInt> sliding_window;
};

/// The additive mask of a 2D padding mask, and of causality: what to_4d and its relatives share.
/// `argument` names the caller's in errors. With `unmask_unattended`, rows in which no key is
/// visible become -0.0, as _unmask_unattended leaves them.
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
  narrow(params.rule, padding_leaf(mask, is_one(mask.scalar_type(), dtype)));
  prepare_and_run(params, out.device(),
                  unmask_unattended ? std::optional(sign_bit(dtype)) : std::nullopt);
  return out;
}

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

/// Kernels have four dimensions; this loops over the outermost of more.
void run_unmask(const at::Tensor& in, const at::Tensor& out, const UnmaskParams& settings) {
  if (in.dim() > StridedRows::kLeading + 1) {
    for (int64_t i = 0; i < in.size(0); ++i) {
      run_unmask(in.select(0, i), out.select(0, i), settings);
    }
    return;
  }
  UnmaskParams params = settings;
  params.in = strided_rows(in);
  params.out = strided_rows(out);
  params.written = out.data_ptr();
  device_kernels(out.device().type()).unmask(params);
}

/// A copy of an additive mask with its rows of `min_dtype` throughout unmasked.
at::Tensor unmask(const Output& output, const at::Tensor& expanded_mask,
                  const c10::Scalar& min_dtype) {
  const char* const op = output.op();
  const at::ScalarType dtype = expanded_mask.scalar_type();
  TORCH_CHECK_VALUE(
      dtype != at::kBool,
      "AttentionMaskConverter._unmask_unattended expects a float `expanded_mask`, got "
      "a BoolTensor.");
  TORCH_CHECK_TYPE(
      is_additive_dtype(dtype) || c10::isIntegralType(dtype, /*includeBool=*/false), op,
      ": expected expanded_mask to be of a real floating or integer dtype, but got ", dtype);
  TORCH_CHECK_TYPE(dtype != at::kUInt16 && dtype != at::kUInt32 && dtype != at::kUInt64, op,
                   ": expected expanded_mask to be of a real floating or integer dtype that torch "
                   "multiplies, but got ",
                   dtype);
  TORCH_CHECK_TYPE(!min_dtype.isComplex(), op, ": expected min_dtype to be a real number, but got ",
                   min_dtype);
  // Not the scalar itself, which would be printed as 64 bits with a sign.
  TORCH_CHECK_VALUE(is_additive_dtype(dtype) || min_dtype.type() != at::kUInt64, op,
                    ": expected min_dtype to fit into 64 bits with a sign, but got ",
                    min_dtype.toUInt64());
  const at::Tensor out = output.like(expanded_mask);
  if (out.is_meta() || out.numel() == 0) {
    return out;
  }
  UnmaskParams settings{};
  settings.is_min = is_equal(dtype, min_dtype);
  settings.sign = sign_bit(dtype);
  const c10::OptionalDeviceGuard guard(out.device());
  run_unmask(expanded_mask, out, settings);
  return out;
}

/// What both operators are given, checked.
struct Checked {
  InputShape shape;
  c10::SymInt kv_length;
  at::ScalarType dtype;
};

template <typename Given>
Checked check_arguments(const char* op, const Given& given) {
  const InputShape shape =
      check_input_shape(op, "input_shape", given.template get<"input_shape">());
  const at::Tensor& embeds = given.template get<"inputs_embeds">();
  const std::optional<at::Tensor>& mask = given.template get<"attention_mask">();
  check_sliding_window(given.template get<"sliding_window">());
  check_additive_dtype(op, "the dtype of inputs_embeds", embeds.scalar_type());
  if (mask) {
    check_same_device(op, "attention_mask", *mask, "inputs_embeds", embeds);
    TORCH_CHECK_VALUE(mask->dim() == 2 || mask->dim() == 4, op,
                      ": expected attention_mask to be 2-D [batch_size, kv_length] or 4-D "
                      "[batch_size, 1, q_length, kv_length], but got ",
                      describe_sizes(*mask));
    check_mask_dtype(op, "attention_mask", *mask);
    if (mask->dim() == 2) {
      ATTN_MASK_CHECK_SYM_VALUE(mask->sym_size(0).sym_eq(shape.batch_size), op,
                                ": expected attention_mask to have batch_size ", shape.batch_size,
                                ", but got ", describe_sizes(*mask));
    }
  }
  // A 4-D mask is used as it is, so that there is no causality to need as many keys.
  const bool fewer_keys = mask && mask->dim() == 4;
  return {shape,
          check_kv_length(op, shape.q_length, given.template get<"past_key_values_length">(),
                          fewer_keys),
          embeds.scalar_type()};
}

/// The mask where none, or padding alone, is given.
template <typename Given>
std::optional<at::Tensor> mask_without_4d(const Output& output, const Given& given,
                                          const Checked& checked, bool unmask_unattended) {
  const auto& [shape, kv_length, dtype] = checked;
  const std::optional<at::Tensor>& mask = given.template get<"attention_mask">();
  const OptionalSymInt& sliding_window = given.template get<"sliding_window">();
  if (!mask) {
    return causal_mask_if_needed(output, shape.batch_size, shape.q_length, kv_length, dtype,
                                 given.template get<"inputs_embeds">().device(), sliding_window);
  }
  return padding_mask_4d(output, "attention_mask", *mask,
                         {shape.q_length, kv_length, /*is_causal=*/true, sliding_window}, dtype,
                         unmask_unattended);
}

/// A 4D mask of ones and zeros (booleans: true attends) becomes additive. It keeps a floating dtype
/// of its own and takes its minimum from the embeddings, as upstream.
at::Tensor invert_4d(const Output& output, const at::Tensor& mask, const Checked& checked) {
  const auto& [shape, kv_length, embeds_dtype] = checked;
  const char* const op = output.op();
  const std::array<c10::SymInt, 4> expected{shape.batch_size, 1, shape.q_length, kv_length};
  for (size_t i = 0; i < expected.size(); ++i) {
    ATTN_MASK_CHECK_SYM_VALUE(mask.sym_size(static_cast<int64_t>(i)).sym_eq(expected[i]),
                              "Incorrect 4D attention_mask shape: (", mask.sym_size(0), ", ",
                              mask.sym_size(1), ", ", mask.sym_size(2), ", ", mask.sym_size(3),
                              "); expected: (", expected[0], ", 1, ", expected[2], ", ",
                              expected[3], ").");
  }
  const at::ScalarType mask_dtype = mask.scalar_type();
  TORCH_CHECK_TYPE(
      !c10::isFloat8Type(mask_dtype), op,
      ": expected a 4-D attention_mask to be of a dtype that torch subtracts, but got ",
      mask_dtype);
  const at::ScalarType dtype = mask_dtype == at::kBool         ? embeds_dtype
                               : is_additive_dtype(mask_dtype) ? mask_dtype
                                                               : at::kFloat;
  const double masked = lowest(embeds_dtype);
  TORCH_CHECK_VALUE(
      masked >= lowest(dtype), op,
      ": expected a 4-D attention_mask of a dtype that can hold the lowest number of ",
      embeds_dtype, " (inputs_embeds), but got ", mask_dtype);
  at::Tensor out =
      output.mask(shape.batch_size, 1, shape.q_length, kv_length, dtype, mask.device());
  if (!out.is_meta()) {
    MaskParams params{};
    set_output(params, out, additive_format(dtype, masked));
    narrow(params.rule, bits_leaf(mask, /*first_row=*/0, is_one(mask_dtype, dtype)));
    run(params, out.device());
  }
  return out;
}

}  // namespace

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

at::Tensor MakeCausalMask::run(const Output& output, const Given& given) {
  return causal_mask_of(&causal_mask, "input_ids_shape", given.get<"input_ids_shape">(), output,
                        given);
}

std::optional<at::Tensor> Create4dCausalAttentionMask::run(const Output& output,
                                                           const Given& given) {
  return causal_mask_of(&causal_mask_if_needed, "input_shape", given.get<"input_shape">(), output,
                        given);
}

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

std::optional<at::Tensor> Prepare4dCausalAttentionMask::run(const Output& output,
                                                            const Given& given) {
  const Checked checked = check_arguments(output.op(), given);
  const std::optional<at::Tensor>& mask = given.get<"attention_mask">();
  if (mask && mask->dim() == 4) {
    return invert_4d(output, *mask, checked);
  }
  return mask_without_4d(output, given, checked, /*unmask_unattended=*/false);
}

std::optional<at::Tensor> Prepare4dCausalAttentionMaskForSdpa::run(const Output& output,
                                                                   const Given& given) {
  const Checked checked = check_arguments(output.op(), given);
  const std::optional<at::Tensor>& mask = given.get<"attention_mask">();
  const std::optional<bool> unmask_unattended = given.get<"unmask_unattended">();
  if (!output.is_given() && given.get<"allow_skip">() &&
      is_causal_enough(output.op(), mask, given.get<"inputs_embeds">(),
                       given.get<"past_key_values_length">(), given.get<"sliding_window">())) {
    return std::nullopt;
  }
  if (is_result(mask, unmask_unattended)) {
    at::Tensor copy = output.like(*mask);
    copy.copy_(mask->detach());
    return copy;
  }
  if (mask && mask->dim() == 4) {
    return unmask(output, *mask, lowest(checked.dtype));
  }
  return mask_without_4d(output, given, checked, mask && is_unmasked(*mask, unmask_unattended));
}

at::Tensor UnmaskUnattended::run(const Output& output, const Given& given) {
  output.check_no_gradient("expanded_mask", given.get<"expanded_mask">());
  return unmask(output, given.get<"expanded_mask">(), given.get<"min_dtype">());
}

at::Tensor UnmaskUnattended::autograd(const Given& given) {
  const at::Tensor& expanded_mask = given.get<"expanded_mask">();
  check_strided(kName, "expanded_mask", expanded_mask);
  const bool differentiable = c10::GradMode::is_enabled() && expanded_mask.requires_grad();
  at::Tensor unmasked;
  {
    const at::AutoDispatchBelowAutograd below;
    unmasked = call_with<UnmaskUnattended>(given);
  }
  if (!differentiable) {
    return unmasked;
  }
  // A bias that is being learned: rows that stay pass their gradient on, unmasked ones have none.
  const at::Tensor fully_masked =
      expanded_mask.detach().eq(given.get<"min_dtype">()).all(-1, /*keepdim=*/true);
  return with_stride_multiple(at::where(fully_masked, unmasked, expanded_mask),
                              given.get<"stride_multiple">());
}

}  // namespace attn_mask::ops
