// attn_mask._C: build information, the table of the operators, and each of them as a plain function
// for eager code, where parsing torch.ops' arguments costs more than a small mask. Graph tracers
// can't see through these: the Python layer calls torch.ops while tracing.

#include <pybind11/eval.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

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

template <typename Operator, typename Call = typename Operator::Call>
struct Direct;

/// The operator as a function of Python, with the arguments of its schema by place or by name.
/// pybind11's own functions would take a microsecond to find eleven names.
template <typename Operator, typename Result, typename... Arguments>
struct Direct<Operator, Result(Arguments...)> {
  static constexpr size_t kSize = sizeof...(Arguments);

  /// Called when the module is made.
  static void define(pybind11::module_& m) {
    for (size_t i = 0; i < kSize; ++i) {
      const ops::Schema::Argument& argument = Operator::kArguments[i];
      names[i] = PyUnicode_InternFromString(std::string(argument.name).c_str());
      if (!argument.otherwise.empty()) {
        otherwise[i] = pybind11::eval(std::string(argument.otherwise)).release().ptr();
      }
    }
    static PyMethodDef method{
        Operator::kName, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&function)),
        METH_FASTCALL | METH_KEYWORDS, Operator::kText};
    const auto name = m.attr("__name__");
    m.attr(Operator::kName) = pybind11::reinterpret_steal<pybind11::object>(
        PyCFunction_NewEx(&method, nullptr, name.ptr()));
  }

 private:
  /// The index of a name, `kSize` for none; most come in the order of the schema.
  static size_t index_of(PyObject* name, size_t guess) {
    for (size_t i = 0; i < kSize; ++i, ++guess) {
      if (PyUnicode_Compare(names[guess % kSize], name) == 0) {
        return guess % kSize;
      }
    }
    return kSize;
  }

  static PyObject* function(PyObject*, PyObject* const* given, Py_ssize_t by_place,
                            PyObject* by_name) {
    std::array<PyObject*, kSize> arguments{};
    const auto placed = static_cast<size_t>(by_place);
    if (placed > kSize) {
      return PyErr_Format(PyExc_TypeError, "%s() takes %zu arguments but %zu were given",
                          Operator::kName, kSize, placed);
    }
    std::copy_n(given, placed, arguments.begin());
    const size_t named = by_name == nullptr ? 0 : PyTuple_GET_SIZE(by_name);
    for (size_t i = 0, guess = placed; i < named; ++i, ++guess) {
      PyObject* const name = PyTuple_GET_ITEM(by_name, i);
      guess = index_of(name, guess);
      if (guess == kSize || arguments[guess] != nullptr) {
        return PyErr_Format(PyExc_TypeError,
                            guess == kSize ? "%s() got an unexpected keyword argument '%U'"
                                           : "%s() got multiple values for argument '%U'",
                            Operator::kName, name);
      }
      arguments[guess] = given[placed + i];
    }
    for (size_t i = 0; i < kSize; ++i) {
      if (arguments[i] == nullptr && (arguments[i] = otherwise[i]) == nullptr) {
        return PyErr_Format(PyExc_TypeError, "%s() missing required argument: '%U'",
                            Operator::kName, names[i]);
      }
    }
    return converted(arguments, std::index_sequence_for<Arguments...>());
  }

  template <size_t... Index>
  static PyObject* converted(const std::array<PyObject*, kSize>& arguments,
                             std::index_sequence<Index...>) {
    try {
      std::tuple<pybind11::detail::make_caster<typename Held<Arguments>::type>...> casters;
      for (const auto& [index, is_of_type] : {std::pair(
               Index, std::get<Index>(casters).load(arguments[Index], /*convert=*/true))...}) {
        if (!is_of_type) {
          const std::string type(Operator::kArguments[index].type);
          return PyErr_Format(PyExc_TypeError, "%s(): argument '%U' must be %s, not %.200s",
                              Operator::kName, names[index], type.c_str(),
                              Py_TYPE(arguments[index])->tp_name);
        }
      }
      Result result = call(pybind11::detail::cast_op<typename Held<Arguments>::type&&>(
          std::move(std::get<Index>(casters)))...);
      return pybind11::cast(std::move(result)).release().ptr();
    } catch (pybind11::error_already_set& error) {
      error.restore();
    } catch (const pybind11::builtin_exception& error) {
      error.set_error();
    } catch (...) {
      torch::translate_exception_to_python(std::current_exception());
    }
    return nullptr;
  }

  /// Without the GIL, with torch's exceptions and warnings. Not by
  /// torch::wrap_pybind_function_no_gil: where a warning is an error, it comes from a destructor
  /// after the `return` there, and g++ then destroys the result twice.
  static Result call(typename Held<Arguments>::type... arguments) {
    std::optional<Result> result;
    HANDLE_TH_ERRORS
    const pybind11::gil_scoped_release no_gil;
    result.emplace(ops::call<Operator>(std::move(arguments)...));
    END_HANDLE_TH_ERRORS_PYBIND
    return std::move(*result);
  }

  // Of Python, for as long as the process runs.
  static inline std::array<PyObject*, kSize> names{};
  static inline std::array<PyObject*, kSize> otherwise{};
};

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
  ops::Operators::for_each([&]<typename Operator>() { Direct<Operator>::define(m); });
}

}  // namespace attn_mask
