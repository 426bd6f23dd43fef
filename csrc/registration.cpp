// What is registered for each dispatch key, of the operators in ops/core/operators.h.

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/TensorOptions.h>
#include <torch/library.h>

#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "ops/core/call.h"
#include "ops/core/checks.h"
#include "ops/core/forms.h"
#include "ops/core/operators.h"
#include "ops/core/register.h"

namespace attn_mask {
namespace {

constexpr auto kNoCudaKernels =
    ": this build of attn_mask has no CUDA kernels (see attn_mask.build_info()), but got ";

/// The operator's name without its namespace, as errors give it.
std::string short_name(const c10::OperatorHandle& op) {
  const std::string& name = op.schema().name();
  return name.substr(name.find("::") + 2);
}

template <typename Operator>
concept Differentiable = requires { Operator::autograd; };

/// The schema of the form with `out`, which may leave the dtype to it.
std::string out_schema(std::string schema) {
  const auto replace = [&](std::string_view part, std::string_view by) {
    if (const size_t at = schema.find(part); at != std::string::npos) {
      schema.replace(at, part.size(), by);
    }
  };
  replace("(", ".out(");
  replace("ScalarType dtype", "ScalarType? dtype=None");
  replace("SymInt stride_multiple=1", "Tensor(a!) out");
  return schema.substr(0, schema.find("->")) + "-> ()";
}

TORCH_LIBRARY(attn_mask, m) {
  ops::Operators::for_each([&]<typename Operator>() {
    m.def(Operator::kText);
    if constexpr (Operator::kWritesMask) {
      m.def(out_schema(Operator::kText).c_str());
    }
  });
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

/// Operators that may be called without a tensor come here first: the key is then that of the
/// device argument. (Typed, since boxing the arguments would cost as much as a small mask.)
template <typename Operator, typename Call = typename Operator::Call>
struct BySelectedDevice;

template <typename Operator, typename Result, typename... Args>
struct BySelectedDevice<Operator, Result(Args...)> {
  static Result call(c10::DispatchKeySet keys, Args... args) {
    static const auto op = ops::find<Operator>();
    bool has_tensor = false;
    (ops::for_each_tensor_of(args, [&](const at::Tensor&) { has_tensor = true; }), ...);
    if (has_tensor) {
      return op.redispatch(keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER,
                                                      c10::DispatchKey::BackendSelect),
                           std::forward<Args>(args)...);
    }
    constexpr size_t kDevice = Operator::Given::index_of("device");
    std::optional<at::Device>& device = std::get<kDevice>(std::tie(args...));
    c10::DispatchKey key = c10::DispatchKey::CPU;
    if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Meta)) {
      // Fake tensors run Meta kernels on behalf of any device, which they put on the result
      // themselves.
      key = c10::DispatchKey::Meta;
      device = at::Device(at::kMeta);
    } else if (device) {
      key = c10::computeDispatchKey(std::nullopt, std::nullopt, *device);
    }
    // Devices other than those named have the kernels that the Python package registers.
    if (!op.hasKernelForDispatchKey(key)) {
      TORCH_CHECK_NOT_IMPLEMENTED(key == c10::DispatchKey::CUDA, Operator::kName,
                                  ": expected device to be cpu, cuda or meta, but got ", *device);
      TORCH_CHECK_NOT_IMPLEMENTED(false, Operator::kName, kNoCudaKernels, *device);
    }
    return op.redispatch(c10::DispatchKeySet(key), std::forward<Args>(args)...);
  }
};

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
  ops::Operators::for_each([&]<typename Operator>() {
    if constexpr (Operator::kIsFactory) {
      m.impl(Operator::kName, &BySelectedDevice<Operator>::call);
    }
  });
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

/// For forms that may be called with a tensor: a boxed kernel, or none.
using MakeKernel = torch::CppFunction();

template <auto Kernel>
torch::CppFunction boxed() {
  return torch::CppFunction::makeFromBoxedFunction<Kernel>();
}

void register_out(torch::Library& m, MakeKernel* kernel) {
  ops::Operators::for_each([&]<typename Operator>() {
    if constexpr (Operator::kWritesMask) {
      m.impl((std::string(Operator::kName) + ".out").c_str(), kernel());
    }
  });
}

void register_on_tensors(torch::Library& m, MakeKernel* kernel, bool differentiable_too) {
  ops::Operators::for_each([&]<typename Operator>() {
    if (Operator::kTakesTensors && (differentiable_too || !Differentiable<Operator>)) {
      m.impl(Operator::kName, kernel());
    }
  });
  register_out(m, kernel);
}

TORCH_LIBRARY_IMPL(attn_mask, Autograd, m) {
  register_on_tensors(m, &boxed<&without_gradient>, /*differentiable_too=*/false);
  ops::Operators::for_each([&]<typename Operator>() {
    if constexpr (Differentiable<Operator>) {
      m.impl(Operator::kName, &ops::Forms<Operator>::autograd);
    }
  });
}

TORCH_LIBRARY_IMPL(attn_mask, Negative, m) { register_out(m, &boxed<&resolve_inputs>); }
TORCH_LIBRARY_IMPL(attn_mask, Conjugate, m) { register_out(m, &boxed<&resolve_inputs>); }

// Kernels for these record nothing, so that nothing needs to be done before them.
void fall_through(torch::Library& m) {
  register_on_tensors(m, &torch::CppFunction::makeFallthrough, /*differentiable_too=*/false);
}

TORCH_LIBRARY_IMPL(attn_mask, AutogradCPU, m) { fall_through(m); }
TORCH_LIBRARY_IMPL(attn_mask, AutogradCUDA, m) { fall_through(m); }

void register_unsupported(torch::Library& m) {
  register_on_tensors(m, &boxed<&unsupported>, /*differentiable_too=*/true);
}

TORCH_LIBRARY_IMPL(attn_mask, CompositeExplicitAutograd, m) { register_unsupported(m); }
TORCH_LIBRARY_IMPL(attn_mask, NestedTensorCPU, m) { register_unsupported(m); }
TORCH_LIBRARY_IMPL(attn_mask, NestedTensorCUDA, m) { register_unsupported(m); }

}  // namespace

void ops::register_all(torch::Library& m) {
  Operators::for_each([&]<typename Operator>() {
    m.impl(Operator::kName, &Forms<Operator>::run);
    if constexpr (Operator::kWritesMask) {
      m.impl((std::string(Operator::kName) + ".out").c_str(), &OutForm<Operator>::run);
    }
  });
}

}  // namespace attn_mask
