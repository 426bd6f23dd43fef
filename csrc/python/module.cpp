// attn_mask._C: build information, the table of the operators, and each of them as a plain function
// for eager code, where parsing torch.ops' arguments costs more than a small mask. Graph tracers
// can't see through these: the Python layer calls torch.ops while tracing.

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <utility>

#include "build_info.h"
#include "format/block_mask.h"
#include "ops/core/call.h"
#include "ops/sdpa_decision.h"
#include "rule/math/limits.h"
#include "rule/program.h"
#include "rule/rule.h"

namespace attn_mask {
namespace {

/// What Python's argument becomes until the call, which gets a view of it.
template <typename Argument>
struct Held : std::remove_cvref<Argument> {};
template <>
struct Held<c10::SymIntArrayRef> : std::type_identity<std::vector<c10::SymInt>> {};
template <>
struct Held<at::TensorList> : std::type_identity<std::vector<at::Tensor>> {};
// torch has no caster for Scalar: numbers come as floats.
template <>
struct Held<const c10::Scalar&> : std::type_identity<double> {};
template <>
struct Held<const std::optional<c10::Scalar>&> : std::type_identity<std::optional<double>> {};

template <typename Operator, typename Run = typename Operator::Run>
struct Direct;

template <typename Operator, typename Result, typename... Arguments>
struct Direct<Operator, Result(Arguments...)> {
  /// The operator for Python: without the GIL, with torch's exceptions and warnings. Not by
  /// torch::wrap_pybind_function_no_gil: where a warning is an error, it comes from a destructor
  /// after the `return` there, and g++ then destroys the result twice.
  static Result call(typename Held<Arguments>::type... arguments) {
    std::optional<Result> result;
    HANDLE_TH_ERRORS
    const pybind11::gil_scoped_release no_gil;
    if constexpr (Operator::kWritesMask) {
      result.emplace(ops::call<Operator>(std::move(arguments)..., ops::kAnyStride));
    } else {
      result.emplace(ops::call<Operator>(std::move(arguments)...));
    }
    END_HANDLE_TH_ERRORS_PYBIND
    return std::move(*result);
  }
};

template <typename Operator, typename Result, typename... Arguments>
struct Direct<Operator, Result(const Output&, Arguments...)>
    : Direct<Operator, Result(Arguments...)> {};

/// The names of the operators, and the traits of each.
pybind11::dict operators() {
  pybind11::dict table;
  ops::Operators::for_each([&]<typename Operator>() {
    pybind11::dict traits;
    traits["writes_mask"] = Operator::kWritesMask;
    traits["is_factory"] = Operator::kIsFactory;
    traits["takes_tensors"] = Operator::kTakesTensors;
    traits["takes_rule"] = Operator::kTakesRule;
    traits["may_give_none"] = Operator::kMayGiveNone;
    traits["is_host_decision"] = Operator::kIsHostDecision;
    table[Operator::kName] = traits;
  });
  return table;
}

/// Throws c10::Error unless the operators of this process have the signatures that are called here:
/// they may come from a library of another version.
void check_operators() {
  ops::Operators::for_each([]<typename Operator>() { ops::find<Operator>(); });
}

/// The types of devices on which rows without a key are unmasked, as torch.device names them.
pybind11::tuple unmasked_devices() {
  pybind11::list names;
  for (const at::DeviceType device : kUnmaskedDevices) {
    names.append(c10::DeviceTypeName(device, /*lower_case=*/true));
  }
  return pybind11::tuple(names);
}

pybind11::dict opcodes() {
  pybind11::dict numbers;
  for (size_t number = 0; number < std::size(kOpcodeNames); ++number) {
    numbers[kOpcodeNames[number]] = number;
  }
  return numbers;
}

pybind11::dict block_states() {
  pybind11::dict numbers;
  for (const auto& [name, state] : {std::pair("EMPTY", BlockState::kEmpty),
                                    {"PARTIAL", BlockState::kPartial},
                                    {"FULL", BlockState::kFull}}) {
    numbers[name] = static_cast<int>(state);
  }
  return numbers;
}

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
  m.attr("OPCODES") = opcodes();
  m.attr("BLOCK_STATES") = block_states();
  m.attr("ABSENT") = kAbsent;
  m.attr("FAR") = kFar;
  m.attr("OPEN") = kOpen;
  m.attr("MAX_DEPTH") = kMaxDepth;
  m.attr("MAX_STEPS") = int32_t{Rule::kMaxSteps};
  m.attr("UNMASKED_DEVICES") = unmasked_devices();
  m.def("check_operators", &check_operators);
  m.def("operators", &operators);
  m.def("build_info", &build_info);
  ops::Operators::for_each(
      [&]<typename Operator>() { m.def(Operator::kName, &Direct<Operator>::call); });
}

}  // namespace attn_mask
