// Every schema on one page, and what is registered for each dispatch key.

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/TensorOptions.h>
#include <torch/library.h>

#include <string_view>
#include <type_traits>

#include "ops/checks.h"
#include "ops/operators.h"
#include "ops/register.h"

namespace attn_mask {
namespace {

constexpr auto kNoCudaKernels =
    ": this build of attn_mask has no CUDA kernels (attn_mask.build_info() tells), but got ";

/// The operator's name without its namespace, as errors give it.
std::string short_name(const c10::OperatorHandle& op) {
  const std::string& name = op.schema().name();
  return name.substr(name.find("::") + 2);
}

/// An operator that writes a mask has two schemas: into a new tensor, and `.out`, where `out` may
/// leave the dtype untold. In `arguments`, `*` stands before those that are given by name.
void define_mask(torch::Library& m, const std::string& name, const std::string& arguments,
                 bool has_dtype, const std::string& result) {
  const size_t star = arguments.find('*');
  const std::string by_place = arguments.substr(0, star) + "*, ";
  std::string by_name = arguments.substr(star + 1);
  by_name += by_name.empty() ? "" : ", ";
  const std::string fresh =
      by_place + (has_dtype ? "ScalarType dtype, " : "") + by_name + "SymInt stride_multiple=1";
  const std::string given =
      by_place + (has_dtype ? "ScalarType? dtype=None, " : "") + by_name + "Tensor(a!) out";
  m.def((name + "(" + fresh + ") -> " + result).c_str());
  m.def((name + ".out(" + given + ") -> ()").c_str());
}

TORCH_LIBRARY(attn_mask, m) {
  constexpr bool kDtype = true;
  define_mask(m, "to_causal_4d",
              "SymInt batch_size, SymInt query_length, SymInt key_value_length, "
              "*Device? device=None, SymInt? sliding_window=None",
              kDtype, "Tensor?");
  define_mask(m, "to_4d",
              "Tensor attention_mask_2d, SymInt query_length, "
              "*SymInt? key_value_length=None, bool is_causal=True, SymInt? sliding_window=None, "
              "bool unmask_unattended=False",
              kDtype, "Tensor");
  define_mask(m, "_make_causal_mask",
              "SymInt[] input_ids_shape, SymInt past_key_values_length=0, "
              "SymInt? sliding_window=None, *Device? device=None",
              kDtype, "Tensor");
  define_mask(m, "_expand_mask", "Tensor mask, SymInt? tgt_len=None, *", kDtype, "Tensor");
  define_mask(m, "_unmask_unattended", "Tensor expanded_mask, Scalar min_dtype, *", !kDtype,
              "Tensor");
  define_mask(m, "_prepare_4d_causal_attention_mask",
              "Tensor? attention_mask, SymInt[] input_shape, Tensor inputs_embeds, "
              "SymInt past_key_values_length, SymInt? sliding_window=None, *",
              !kDtype, "Tensor?");
  define_mask(m, "_prepare_4d_causal_attention_mask_for_sdpa",
              "Tensor? attention_mask, SymInt[] input_shape, Tensor inputs_embeds, "
              "SymInt past_key_values_length, SymInt? sliding_window=None, *bool allow_skip=True, "
              "bool? unmask_unattended=None",
              !kDtype, "Tensor?");
  define_mask(m, "_prepare_4d_attention_mask", "Tensor mask, SymInt? tgt_len=None, *", kDtype,
              "Tensor");
  define_mask(m, "_prepare_4d_attention_mask_for_sdpa",
              "Tensor mask, SymInt? tgt_len=None, *bool allow_skip=True", kDtype, "Tensor?");
  define_mask(m, "_create_4d_causal_attention_mask",
              "SymInt[] input_shape, SymInt past_key_values_length=0, SymInt? sliding_window=None, "
              "*Device? device=None",
              kDtype, "Tensor?");
  // Any rule: ops/rule_program.h says how `rule` spells it.
  define_mask(m, "boolean",
              "SymInt[] rule, Tensor[] operands, SymInt batch_size, SymInt q_length, "
              "SymInt kv_length, *SymInt q_offset=0, SymInt kv_offset=0, "
              "Tensor? q_positions=None, Tensor? kv_positions=None, Device? device=None, "
              "bool unmask_unattended=False",
              !kDtype, "Tensor");
  define_mask(m, "additive",
              "SymInt[] rule, Tensor[] operands, SymInt batch_size, SymInt q_length, "
              "SymInt kv_length, *SymInt q_offset=0, SymInt kv_offset=0, "
              "Tensor? q_positions=None, Tensor? kv_positions=None, Tensor? bias=None, "
              "Device? device=None, bool unmask_unattended=False, Scalar? masked_value=None",
              kDtype, "Tensor");
  // Any rule, block by block.
  const std::string of_blocks =
      "SymInt[] rule, Tensor[] operands, SymInt batch_size, SymInt heads, SymInt q_length, "
      "SymInt kv_length, SymInt q_block_size, SymInt kv_block_size, *, SymInt q_offset=0, "
      "SymInt kv_offset=0, Tensor? q_positions=None, Tensor? kv_positions=None, "
      "Device? device=None";
  m.def(("block_mask(" + of_blocks +
         ", bool separate_full_blocks=True, SymInt? kv_width=None, SymInt? q_width=None) -> "
         "Tensor[]")
            .c_str());
  m.def(("_block_states(" + of_blocks + ") -> Tensor").c_str());
  // What wait for the device to look at values.
  m.def(("_block_mask_widths(" + of_blocks + ", bool separate_full_blocks=True) -> int[]").c_str());
  m.def(
      "_ignore_causal_mask_sdpa(Tensor? attention_mask, Tensor inputs_embeds, "
      "SymInt past_key_values_length, SymInt? sliding_window=None, bool is_training=False) -> "
      "bool");
  m.def("_is_all_visible(Tensor mask) -> bool");
}

TORCH_LIBRARY_IMPL(attn_mask, CPU, m) { ops::register_all(m); }
TORCH_LIBRARY_IMPL(attn_mask, Meta, m) { ops::register_all(m); }

/// Calls `visit(argument name, tensor)` for every tensor among the arguments, lists included.
template <typename Visit>
void for_each_tensor(const c10::OperatorHandle& op, const torch::jit::Stack& stack, Visit visit) {
  const auto& arguments = op.schema().arguments();
  const auto values = torch::jit::last(stack, arguments.size());
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i].isTensor()) {
      visit(arguments[i].name(), values[i].toTensor());
    } else if (values[i].isTensorList()) {
      for (const at::Tensor& tensor : values[i].toTensorVector()) {
        visit(arguments[i].name(), tensor);
      }
    }
  }
}

bool holds_tensor(const std::optional<at::Tensor>& tensor) { return tensor.has_value(); }
bool holds_tensor(at::TensorList tensors) { return !tensors.empty(); }
template <typename T>
bool holds_tensor(const T&) {
  return false;
}

void take_device(std::optional<at::Device>& device, std::optional<at::Device>*& taken) {
  taken = &device;
}
template <typename T>
void take_device(T&, std::optional<at::Device>*&) {}

/// Operators that may be called without a tensor come here first: the key is then that of the
/// device asked for. (Typed, since boxing the arguments would cost as much as a small mask.)
template <auto Function>
struct BySelectedDevice;

template <typename Result, typename... Args, Result (*Function)(Args...)>
struct BySelectedDevice<Function> {
  static inline std::optional<c10::TypedOperatorHandle<Result(Args...)>> op;

  static Result call(c10::DispatchKeySet keys, Args... args) {
    if ((holds_tensor(args) || ...)) {
      return op->redispatch(keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER,
                                                       c10::DispatchKey::BackendSelect),
                            std::forward<Args>(args)...);
    }
    std::optional<at::Device>* device = nullptr;
    (take_device(args, device), ...);
    c10::DispatchKey key = c10::DispatchKey::CPU;
    if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Meta)) {
      // Fake tensors run Meta kernels on behalf of any device, which they put on the result
      // themselves.
      key = c10::DispatchKey::Meta;
      *device = at::Device(at::kMeta);
    } else if (*device) {
      key = c10::computeDispatchKey(std::nullopt, std::nullopt, **device);
    }
    // Devices other than those named have the kernels that the Python package registers.
    if (!op->hasKernelForDispatchKey(key)) {
      TORCH_CHECK_NOT_IMPLEMENTED(key == c10::DispatchKey::CUDA, short_name(*op),
                                  ": expected device to be cpu, cuda or meta, but got ", **device);
      TORCH_CHECK_NOT_IMPLEMENTED(false, short_name(*op), kNoCudaKernels, **device);
    }
    return op->redispatch(c10::DispatchKeySet(key), std::forward<Args>(args)...);
  }
};

template <auto Function>
void select_by_device(torch::Library& m, const char* name) {
  using Select = BySelectedDevice<Function>;
  Select::op = c10::Dispatcher::singleton()
                   .findSchemaOrThrow((std::string("attn_mask::") + name).c_str(), "")
                   .template typed<std::remove_pointer_t<decltype(Function)>>();
  m.impl(name, &Select::call);
}

/// Whatever no other key takes: layouts and devices without a kernel.
void unsupported(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const std::string op_name = short_name(op);
  for_each_tensor(op, *stack, [&](const std::string& argument, const at::Tensor& tensor) {
    check_strided(op_name.c_str(), argument.c_str(), tensor);
    TORCH_CHECK_TYPE(!tensor.is_quantized(), op_name, ": expected ", argument,
                     " to be of a boolean, integer or real floating dtype, but got ",
                     tensor.scalar_type());
    TORCH_CHECK_NOT_IMPLEMENTED(
        tensor.device().is_cpu() || tensor.device().is_cuda() || tensor.is_meta(), op_name,
        ": expected ", argument, " to be on cpu, cuda or meta, but got ", tensor.device());
    TORCH_CHECK_NOT_IMPLEMENTED(!tensor.is_cuda(), op_name, kNoCudaKernels, tensor.device());
  });
  TORCH_CHECK_NOT_IMPLEMENTED(false, op_name, ": no kernel for these arguments");
}

/// Masks are data, not functions of their operands that anyone differentiates; without this kernel
/// torch would warn about a missing derivative when a padding mask happens to require grad.
void without_gradient(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                      torch::jit::Stack* stack) {
  for_each_tensor(op, *stack, [&](const std::string&, const at::Tensor& tensor) {
    if (tensor.layout() != at::kStrided) {
      // Here, too, because a jagged tensor is a Python subclass that no other kernel gets to see.
      unsupported(op, keys, stack);
    }
  });
  const at::AutoDispatchBelowAutograd below;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

TORCH_LIBRARY_IMPL(attn_mask, BackendSelect, m) {
  select_by_device<&ops::to_causal_4d>(m, "to_causal_4d");
  select_by_device<&ops::make_causal_mask>(m, "_make_causal_mask");
  select_by_device<&ops::create_4d_causal_attention_mask>(m, "_create_4d_causal_attention_mask");
  select_by_device<&ops::boolean>(m, "boolean");
  select_by_device<&ops::additive>(m, "additive");
  select_by_device<&ops::block_mask>(m, "block_mask");
  select_by_device<&ops::block_states>(m, "_block_states");
  select_by_device<&ops::block_mask_widths>(m, "_block_mask_widths");
}

/// Views that are stored as their own negatives or conjugates: inputs are put right first, as for
/// any operator, but torch's own way to do so expects `out` to be returned.
void resolve_inputs(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                    torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto resolved = [](const at::Tensor& tensor) {
    return tensor.resolve_neg().resolve_conj();
  };
  for (size_t i = 0; i < arguments.size(); ++i) {
    c10::IValue& value = torch::jit::peek(*stack, i, arguments.size());
    if (value.isTensor()) {
      const at::Tensor tensor = value.toTensor();
      TORCH_CHECK_TYPE(
          arguments[i].name() != "out" || !(tensor.is_neg() || tensor.is_conj()), short_name(op),
          ": expected out to be stored as it is, but got a negated or conjugated view");
      value = resolved(tensor);
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> tensors;
      for (const at::Tensor& tensor : value.toTensorVector()) {
        tensors.push_back(resolved(tensor));
      }
      value = tensors;
    }
  }
  op.redispatchBoxed(
      keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::Conjugate),
      stack);
}

// Those that may be called with a tensor.
constexpr const char* kOnTensors[] = {"to_causal_4d.out",
                                      "to_4d",
                                      "to_4d.out",
                                      "_make_causal_mask.out",
                                      "_expand_mask",
                                      "_expand_mask.out",
                                      "_unmask_unattended",
                                      "_unmask_unattended.out",
                                      "_ignore_causal_mask_sdpa",
                                      "_is_all_visible",
                                      "_prepare_4d_causal_attention_mask",
                                      "_prepare_4d_causal_attention_mask.out",
                                      "_prepare_4d_causal_attention_mask_for_sdpa",
                                      "_prepare_4d_causal_attention_mask_for_sdpa.out",
                                      "_prepare_4d_attention_mask",
                                      "_prepare_4d_attention_mask.out",
                                      "_prepare_4d_attention_mask_for_sdpa",
                                      "_prepare_4d_attention_mask_for_sdpa.out",
                                      "_create_4d_causal_attention_mask.out",
                                      "boolean",
                                      "boolean.out",
                                      "additive",
                                      "additive.out",
                                      "block_mask",
                                      "_block_states",
                                      "_block_mask_widths"};

bool is_differentiable(std::string_view name) {
  return name == "_unmask_unattended" || name == "additive";
}

TORCH_LIBRARY_IMPL(attn_mask, Autograd, m) {
  for (const char* name : kOnTensors) {
    if (!is_differentiable(name)) {
      m.impl(name, torch::CppFunction::makeFromBoxedFunction<&without_gradient>());
    }
  }
  m.impl("_unmask_unattended", &ops::unmask_unattended_autograd);
  m.impl("additive", &ops::additive_autograd);
}

void register_resolving(torch::Library& m) {
  for (const std::string_view name : kOnTensors) {
    if (name.ends_with(".out")) {
      m.impl(name.data(), torch::CppFunction::makeFromBoxedFunction<&resolve_inputs>());
    }
  }
}

TORCH_LIBRARY_IMPL(attn_mask, Negative, m) { register_resolving(m); }
TORCH_LIBRARY_IMPL(attn_mask, Conjugate, m) { register_resolving(m); }

// Kernels for these record nothing, so that nothing needs to be done before them.
void fall_through(torch::Library& m) {
  for (const char* name : kOnTensors) {
    if (!is_differentiable(name)) {
      m.impl(name, torch::CppFunction::makeFallthrough());
    }
  }
}

TORCH_LIBRARY_IMPL(attn_mask, AutogradCPU, m) { fall_through(m); }
TORCH_LIBRARY_IMPL(attn_mask, AutogradCUDA, m) { fall_through(m); }

void register_unsupported(torch::Library& m) {
  for (const char* name : kOnTensors) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&unsupported>());
  }
}

TORCH_LIBRARY_IMPL(attn_mask, CompositeExplicitAutograd, m) { register_unsupported(m); }
TORCH_LIBRARY_IMPL(attn_mask, NestedTensorCPU, m) { register_unsupported(m); }
TORCH_LIBRARY_IMPL(attn_mask, NestedTensorCUDA, m) { register_unsupported(m); }

}  // namespace
}  // namespace attn_mask
