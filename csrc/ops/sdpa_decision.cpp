#include "ops/sdpa_decision.h"

#include <ATen/Functions.h>

#include "cpu/dispatch.h"
#include "ops/core/checks.h"
#include "ops/core/dtypes.h"
#include "ops/core/few_dimensions.h"
#include "ops/core/operators.h"

namespace attn_mask {
namespace {

/// Reads the mask, which must have values, on the host; `test` is what they should fulfil, and
/// `on_device` the same in torch's words, as a 0-d boolean tensor.
template <typename OnDevice>
bool is_all(const char* op, const char* argument, const at::Tensor& mask, const KeyTest& test,
            OnDevice on_device) {
  TORCH_CHECK_VALUE(!mask.is_meta(), op, ": expected ", argument,
                    " to have values, but got a meta tensor");
  if (mask.device().is_cpu()) {
    return all_cpu(strided_rows(with_few_dimensions(mask)), test);
  }
  return on_device(mask).template item<bool>();
}

}  // namespace

bool is_all_ones(const char* op, const char* argument, const at::Tensor& mask) {
  check_mask_dtype(op, argument, mask);
  return is_all(op, argument, mask, is_one(mask.scalar_type(), mask.scalar_type()),
                [](const at::Tensor& on_device) { return on_device.eq(1).all(); });
}

bool needs_causal_mask(const c10::SymInt& q_length,
                       const std::optional<c10::SymInt>& sliding_window) {
  return sliding_window.has_value() || q_length > 1;
}

bool is_causal_enough(const char* op, const std::optional<at::Tensor>& attention_mask,
                      const at::Tensor& inputs_embeds, const c10::SymInt& past_key_values_length,
                      const std::optional<c10::SymInt>& sliding_window) {
  check_sliding_window(sliding_window);
  TORCH_CHECK_VALUE(inputs_embeds.dim() >= 2, op,
                    ": expected inputs_embeds to be [batch_size, query_length, ...], but got ",
                    describe_sizes(inputs_embeds));
  if (attention_mask) {
    check_same_device(op, "attention_mask", *attention_mask, "inputs_embeds", inputs_embeds);
  }
  const bool is_4d = attention_mask && attention_mask->dim() == 4;
  const c10::SymInt& q_length = inputs_embeds.sym_size(1);
  const c10::SymInt kv_length =
      check_kv_length(op, q_length, past_key_values_length, /*fewer_keys=*/is_4d);
  const bool shapes_allow =
      (q_length == 1 || kv_length == q_length) && (!sliding_window || kv_length < *sliding_window);
  if (!shapes_allow || !attention_mask) {
    return shapes_allow;
  }
  return !is_4d && is_all_ones(op, "attention_mask", *attention_mask);
}

namespace ops {

bool IgnoreCausalMaskSdpa::run(const Given& given) {
  // `is_training` matters to upstream while tracing alone.
  return is_causal_enough(kName, given.get<"attention_mask">(), given.get<"inputs_embeds">(),
                          given.get<"past_key_values_length">(), given.get<"sliding_window">());
}

bool IsAllVisible::run(const Given& given) {
  const at::Tensor& mask = given.get<"mask">();
  check_mask_dtype(kName, "mask", mask);
  return is_all(kName, "mask", mask, is_nonzero(mask.scalar_type()),
                [](const at::Tensor& on_device) { return on_device.all(); });
}

}  // namespace ops
}  // namespace attn_mask
