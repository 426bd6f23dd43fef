#include <array>
#include <optional>

#include "ops/causal_mask.h"
#include "ops/core/checks.h"
#include "ops/core/dtypes.h"
#include "ops/core/operators.h"
#include "ops/core/output.h"
#include "ops/core/write_mask.h"
#include "ops/padding_mask.h"
#include "ops/sdpa_decision.h"
#include "ops/unmask_unattended.h"

namespace attn_mask::ops {
namespace {

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
std::optional<at::Tensor> causal_mask_of(const Output& output, const Given& given,
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
    const Padding given{mask.const_data_ptr(),
                        mask.stride(0),
                        /*head_stride=*/0,
                        mask.stride(2),
                        mask.stride(3),
                        mask.size(3),
                        static_cast<int32_t>(mask.element_size()),
                        /*by_column=*/true,
                        is_one(mask_dtype, dtype)};
    MaskParams params{};
    set_output(params, out, additive_format(dtype, masked));
    narrow(params.rule, given);
    run(params, out.device());
  }
  return out;
}

}  // namespace

std::optional<at::Tensor> Prepare4dCausalAttentionMask::run(const Output& output,
                                                            const Given& given) {
  const Checked checked = check_arguments(output.op(), given);
  const std::optional<at::Tensor>& mask = given.get<"attention_mask">();
  if (mask && mask->dim() == 4) {
    return invert_4d(output, *mask, checked);
  }
  return causal_mask_of(output, given, checked, /*unmask_unattended=*/false);
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
  return causal_mask_of(output, given, checked, mask && is_unmasked(*mask, unmask_unattended));
}

}  // namespace attn_mask::ops
