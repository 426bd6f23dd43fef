// attn_mask._C: build information, and the operators as plain functions for eager code, where
// parsing torch.ops' arguments costs more than a small mask. Graph tracers can't see through these:
// the Python layer calls torch.ops while tracing.

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <utility>

#include "build_info.h"
#include "ops/call.h"
#include "rule/limits.h"

namespace attn_mask {
namespace {

using ops::OptionalSymInt;

constexpr int64_t kAnyStride = 1;

std::optional<at::Tensor> to_causal_4d(c10::SymInt batch_size, c10::SymInt query_length,
                                       c10::SymInt key_value_length, at::ScalarType dtype,
                                       at::Device device, OptionalSymInt sliding_window) {
  return call::to_causal_4d(std::move(batch_size), std::move(query_length),
                            std::move(key_value_length), dtype, device, std::move(sliding_window),
                            kAnyStride);
}

at::Tensor to_4d(const at::Tensor& attention_mask_2d, c10::SymInt query_length,
                 at::ScalarType dtype, OptionalSymInt key_value_length, bool is_causal,
                 OptionalSymInt sliding_window, bool unmask_unattended) {
  return call::to_4d(attention_mask_2d, std::move(query_length), dtype, std::move(key_value_length),
                     is_causal, std::move(sliding_window), unmask_unattended, kAnyStride);
}

at::Tensor expand_mask(const at::Tensor& mask, OptionalSymInt tgt_len, at::ScalarType dtype) {
  return call::expand_mask(mask, std::move(tgt_len), dtype, kAnyStride);
}

bool ignore_causal_mask_sdpa(const std::optional<at::Tensor>& attention_mask,
                             const at::Tensor& inputs_embeds, c10::SymInt past_key_values_length,
                             OptionalSymInt sliding_window) {
  return call::ignore_causal_mask_sdpa(attention_mask, inputs_embeds,
                                       std::move(past_key_values_length), std::move(sliding_window),
                                       /*is_training=*/false);
}

std::optional<at::Tensor> prepare_4d_attention_mask_for_sdpa(const at::Tensor& mask,
                                                             OptionalSymInt tgt_len,
                                                             at::ScalarType dtype) {
  return call::prepare_4d_attention_mask_for_sdpa(mask, std::move(tgt_len), dtype,
                                                  /*allow_skip=*/true, kAnyStride);
}

/// boolean without a dtype, additive with one.
at::Tensor rule_mask(const std::vector<c10::SymInt>& rule, const std::vector<at::Tensor>& operands,
                     c10::SymInt batch_size, c10::SymInt q_length, c10::SymInt kv_length,
                     c10::SymInt q_offset, c10::SymInt kv_offset,
                     const std::optional<at::Tensor>& q_positions,
                     const std::optional<at::Tensor>& kv_positions,
                     std::optional<at::Device> device, std::optional<at::ScalarType> dtype,
                     const std::optional<at::Tensor>& bias, bool unmask_unattended,
                     std::optional<double> masked_value) {
  if (dtype) {
    const auto masked = masked_value ? std::optional<c10::Scalar>(*masked_value) : std::nullopt;
    return call::additive(rule, operands, std::move(batch_size), std::move(q_length),
                          std::move(kv_length), *dtype, std::move(q_offset), std::move(kv_offset),
                          q_positions, kv_positions, bias, device, unmask_unattended, masked,
                          kAnyStride);
  }
  return call::boolean(rule, operands, std::move(batch_size), std::move(q_length),
                       std::move(kv_length), std::move(q_offset), std::move(kv_offset), q_positions,
                       kv_positions, device, unmask_unattended, kAnyStride);
}

std::vector<at::Tensor> block_mask(const std::vector<c10::SymInt>& rule,
                                   const std::vector<at::Tensor>& operands, c10::SymInt batch_size,
                                   c10::SymInt heads, c10::SymInt q_length, c10::SymInt kv_length,
                                   c10::SymInt q_block_size, c10::SymInt kv_block_size,
                                   c10::SymInt q_offset, c10::SymInt kv_offset,
                                   const std::optional<at::Tensor>& q_positions,
                                   const std::optional<at::Tensor>& kv_positions,
                                   std::optional<at::Device> device, bool separate_full_blocks,
                                   OptionalSymInt kv_width, OptionalSymInt q_width) {
  return call::block_mask(rule, operands, std::move(batch_size), std::move(heads),
                          std::move(q_length), std::move(kv_length), std::move(q_block_size),
                          std::move(kv_block_size), std::move(q_offset), std::move(kv_offset),
                          q_positions, kv_positions, device, separate_full_blocks,
                          std::move(kv_width), std::move(q_width));
}

/// The types of devices on which rows without a key are unmasked, as torch.device names them.
pybind11::tuple unmasked_devices() {
  pybind11::list names;
  for (const at::DeviceType device : ops::kUnmaskedDevices) {
    names.append(c10::DeviceTypeName(device, /*lower_case=*/true));
  }
  return pybind11::tuple(names);
}

bool is_all_visible(const at::Tensor& mask) { return call::is_all_visible(mask); }

/// FUNCTION for Python: without the GIL, with torch's exceptions and warnings. Not by
/// torch::wrap_pybind_function_no_gil: where a warning is an error, it comes from a destructor
/// behind the `return` there, and g++ then destroys the result twice.
template <auto Function>
struct Direct;

template <typename Result, typename... Args, Result (*Function)(Args...)>
struct Direct<Function> {
  static Result call(Args... args) {
    std::optional<Result> result;
    HANDLE_TH_ERRORS
    const pybind11::gil_scoped_release no_gil;
    result.emplace(Function(std::forward<Args>(args)...));
    END_HANDLE_TH_ERRORS_PYBIND
    return std::move(*result);
  }
};

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = kVersion;
  info["torch_version"] = kTorchVersion;
  info["cuda_version"] =
      *kCudaVersion ? pybind11::object(pybind11::str(kCudaVersion)) : pybind11::none();
  info["cuda_archs"] = pybind11::str(kCudaArchs).attr("split")();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("FAR") = kFar;
  m.attr("UNMASKED_DEVICES") = unmasked_devices();
  m.def("check_operators", &call::check_operators);
  m.def("build_info", &build_info);
  m.def("to_causal_4d", &Direct<&to_causal_4d>::call);
  m.def("to_4d", &Direct<&to_4d>::call);
  m.def("expand_mask", &Direct<&expand_mask>::call);
  m.def("prepare_4d_attention_mask_for_sdpa", &Direct<&prepare_4d_attention_mask_for_sdpa>::call);
  m.def("rule_mask", &Direct<&rule_mask>::call);
  m.def("block_mask", &Direct<&block_mask>::call);
  m.def("ignore_causal_mask_sdpa", &Direct<&ignore_causal_mask_sdpa>::call);
  m.def("is_all_visible", &Direct<&is_all_visible>::call);
}

}  // namespace attn_mask
