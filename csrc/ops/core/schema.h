#pragma once

// An operator's schema, read by the compiler: its types in C++, and its traits.

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/Scalar.h>
#include <c10/core/ScalarType.h>
#include <c10/core/SymInt.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace attn_mask {

class Output;

using OptionalSymInt = std::optional<c10::SymInt>;

namespace ops {

/// `text.find(part)`, which is no constant expression for g++ 12 under -fsanitize=undefined.
constexpr size_t position_of(std::string_view text, std::string_view part) {
  for (size_t begin = 0; begin + part.size() <= text.size(); ++begin) {
    if (text.substr(begin, part.size()) == part) {
      return begin;
    }
  }
  return std::string_view::npos;
}

/// Text that can be a template's argument; a literal becomes one.
template <size_t N>
struct Text {
  char text[N]{};

  consteval Text(const char (&literal)[N]) { std::copy_n(literal, N, text); }
  consteval explicit Text(std::string_view part) { std::ranges::copy(part, text); }

  constexpr std::string_view view() const { return {text, N - 1}; }
};

/// The parts of `name(arguments) -> result`. The last argument of operators that write a mask is
/// counted apart: it becomes `out` in their other form.
struct Schema {
  static constexpr std::string_view kStrideMultiple = ", SymInt stride_multiple=1";

  consteval explicit Schema(std::string_view text)
      : name(text.substr(0, position_of(text, "("))),
        arguments(text.substr(name.size() + 1, position_of(text, ") -> ") - name.size() - 1)),
        result(text.substr(position_of(text, ") -> ") + 5)),
        writes_mask(arguments.ends_with(kStrideMultiple)) {
    if (writes_mask) {
      arguments.remove_suffix(kStrideMultiple.size());
    }
  }

  /// The type of an argument, empty after the last. `*`, after which arguments are given by name,
  /// is none.
  consteval std::string_view type(size_t index) const {
    for (std::string_view rest = arguments; !rest.empty();) {
      const std::string_view argument = rest.substr(0, position_of(rest, ", "));
      rest.remove_prefix(std::min(rest.size(), argument.size() + 2));
      if (argument != "*" && index-- == 0) {
        return argument.substr(0, position_of(argument, " "));
      }
    }
    return {};
  }

  consteval size_t size() const {
    size_t count = 0;
    while (!type(count).empty()) {
      ++count;
    }
    return count;
  }

  constexpr bool takes(std::string_view part) const {
    return position_of(arguments, part) != std::string_view::npos;
  }

  std::string_view name;
  std::string_view arguments;
  std::string_view result;
  bool writes_mask;
};

/// How torch passes an argument of a type.
template <Text Type>
struct Passed;
template <>
struct Passed<"Tensor"> : std::type_identity<const at::Tensor&> {};
template <>
struct Passed<"Tensor?"> : std::type_identity<const std::optional<at::Tensor>&> {};
template <>
struct Passed<"Tensor[]"> : std::type_identity<at::TensorList> {};
template <>
struct Passed<"SymInt"> : std::type_identity<c10::SymInt> {};
template <>
struct Passed<"SymInt?"> : std::type_identity<OptionalSymInt> {};
template <>
struct Passed<"SymInt[]"> : std::type_identity<c10::SymIntArrayRef> {};
template <>
struct Passed<"Scalar"> : std::type_identity<const c10::Scalar&> {};
template <>
struct Passed<"Scalar?"> : std::type_identity<const std::optional<c10::Scalar>&> {};
template <>
struct Passed<"float?"> : std::type_identity<std::optional<double>> {};
template <>
struct Passed<"ScalarType"> : std::type_identity<at::ScalarType> {};
template <>
struct Passed<"Device?"> : std::type_identity<std::optional<at::Device>> {};
template <>
struct Passed<"bool"> : std::type_identity<bool> {};
template <>
struct Passed<"bool?"> : std::type_identity<std::optional<bool>> {};

template <Text Type>
struct Returned;
template <>
struct Returned<"Tensor"> : std::type_identity<at::Tensor> {};
template <>
struct Returned<"Tensor?"> : std::type_identity<std::optional<at::Tensor>> {};
template <>
struct Returned<"Tensor[]"> : std::type_identity<std::vector<at::Tensor>> {};
template <>
struct Returned<"(Tensor, Tensor)"> : std::type_identity<std::tuple<at::Tensor, at::Tensor>> {};
template <>
struct Returned<"(Tensor, Tensor, Tensor)">
    : std::type_identity<std::tuple<at::Tensor, at::Tensor, at::Tensor>> {};
template <>
struct Returned<"bool"> : std::type_identity<bool> {};
template <>
struct Returned<"int[]"> : std::type_identity<std::vector<int64_t>> {};

template <Text Literal>
inline constexpr Schema kSchema{Literal.view()};

template <Text Literal, size_t Index>
consteval auto type_of_argument() {
  constexpr std::string_view type = kSchema<Literal>.type(Index);
  return Text<type.size() + 1>(type);
}

template <Text Literal>
consteval auto type_of_result() {
  constexpr std::string_view type = kSchema<Literal>.result;
  return Text<type.size() + 1>(type);
}

/// An operator's row of the table (table.h) is a struct with this as its base.
template <Text Literal, typename Arguments = std::make_index_sequence<kSchema<Literal>.size()>>
struct Operator;

template <Text Literal, size_t... Index>
struct Operator<Literal, std::index_sequence<Index...>> {
  static constexpr const char* kText = Literal.text;
  static constexpr Text<kSchema<Literal>.name.size() + 1> kNameText{kSchema<Literal>.name};
  static constexpr const char* kName = kNameText.text;

  /// Besides the form that makes a new tensor there is `.out`, into one of the caller's.
  static constexpr bool kWritesMask = kSchema<Literal>.writes_mask;
  /// It may be called without a tensor: the device is then an argument.
  static constexpr bool kIsFactory = kSchema<Literal>.takes("Device? device");
  static constexpr bool kTakesTensors = kSchema<Literal>.takes("Tensor");
  static constexpr bool kTakesRule = kSchema<Literal>.takes("SymInt[] rule");
  static constexpr bool kMayGiveNone = kSchema<Literal>.result == "Tensor?";
  /// The result is no tensor but a value, for which the host may wait for the device.
  static constexpr bool kIsHostDecision =
      position_of(kSchema<Literal>.result, "Tensor") == std::string_view::npos;
  /// Whether `out` may be the very tensor that is read.
  static constexpr bool kMayWriteInPlace = false;

  template <size_t I>
  using Argument = typename Passed<type_of_argument<Literal, I>()>::type;
  using Result = typename Returned<type_of_result<Literal>()>::type;

  /// What is called through the dispatcher.
  using Call = std::conditional_t<kWritesMask, Result(Argument<Index>..., c10::SymInt),
                                  Result(Argument<Index>...)>;

  /// What is written for an operator: once, for the new tensor and for the caller's.
  using Run = std::conditional_t<kWritesMask, Result(const Output&, Argument<Index>...),
                                 Result(Argument<Index>...)>;
};

}  // namespace ops
}  // namespace attn_mask
