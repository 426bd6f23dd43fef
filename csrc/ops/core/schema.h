#pragma once

// An operator's schema, read by the compiler: its types in C++, and its traits.

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/Scalar.h>
#include <c10/core/ScalarType.h>
#include <c10/core/SymInt.h>

#include <algorithm>
#include <array>
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

/// One text of several: fragments that operators share are constants.
template <Text... Parts>
consteval auto joined() {
  Text<(Parts.view().size() + ... + 1)> result{std::string_view()};
  char* end = result.text;
  ((end = std::ranges::copy(Parts.view(), end).out), ...);
  return result;
}

/// The parts of `name(arguments) -> result`.
struct Schema {
  struct Argument {
    std::string_view type;
    std::string_view name;
    std::string_view otherwise;  // what it is where it is not given; empty: it must be
  };

  consteval explicit Schema(std::string_view text)
      : name(text.substr(0, position_of(text, "("))),
        arguments(text.substr(name.size() + 1, position_of(text, ") -> ") - name.size() - 1)),
        result(text.substr(position_of(text, ") -> ") + 5)),
        writes_mask(arguments.ends_with(", SymInt stride_multiple=1")) {}

  /// An argument, without a type after the last. `*`, after which arguments are given by name, is
  /// none.
  constexpr Argument argument(size_t index) const {
    for (std::string_view rest = arguments; !rest.empty();) {
      const std::string_view text = rest.substr(0, position_of(rest, ", "));
      rest.remove_prefix(std::min(rest.size(), text.size() + 2));
      if (text != "*" && index-- == 0) {
        const size_t space = position_of(text, " ");
        const size_t equals = std::min(position_of(text, "="), text.size());
        return {text.substr(0, space), text.substr(space + 1, equals - space - 1),
                text.substr(std::min(equals + 1, text.size()))};
      }
    }
    return {};
  }

  constexpr size_t size() const {
    size_t count = 0;
    while (!argument(count).type.empty()) {
      ++count;
    }
    return count;
  }

  /// Where the argument of this name is; `size()`: nowhere.
  constexpr size_t index_of(std::string_view of_name) const {
    size_t index = 0;
    while (!argument(index).type.empty() && argument(index).name != of_name) {
      ++index;
    }
    return index;
  }

  constexpr bool takes(std::string_view part) const {
    return position_of(arguments, part) != std::string_view::npos;
  }

  std::string_view name;
  std::string_view arguments;
  std::string_view result;
  bool writes_mask;  // into a new tensor; in the other form the last argument becomes `out`
};

/// A type of schemas, and what it is in C++.
template <typename T>
struct Type {
  using type = T;
  std::string_view name;
};

/// How torch passes arguments.
inline constexpr std::tuple kPassed{
    Type<const at::Tensor&>{"Tensor"},
    Type<const std::optional<at::Tensor>&>{"Tensor?"},
    Type<at::TensorList>{"Tensor[]"},
    Type<c10::SymInt>{"SymInt"},
    Type<OptionalSymInt>{"SymInt?"},
    Type<c10::SymIntArrayRef>{"SymInt[]"},
    Type<const c10::Scalar&>{"Scalar"},
    Type<const std::optional<c10::Scalar>&>{"Scalar?"},
    Type<std::optional<double>>{"float?"},
    Type<at::ScalarType>{"ScalarType"},
    Type<std::optional<at::Device>>{"Device?"},
    Type<bool>{"bool"},
    Type<std::optional<bool>>{"bool?"},
};

inline constexpr std::tuple kReturned{
    Type<at::Tensor>{"Tensor"},
    Type<std::optional<at::Tensor>>{"Tensor?"},
    Type<std::vector<at::Tensor>>{"Tensor[]"},
    Type<std::tuple<at::Tensor, at::Tensor>>{"(Tensor, Tensor)"},
    Type<std::tuple<at::Tensor, at::Tensor, at::Tensor>>{"(Tensor, Tensor, Tensor)"},
    Type<bool>{"bool"},
    Type<std::vector<int64_t>>{"int[]"},
};

/// Where the type of this name is in one of the two lists; beyond it where there is none.
template <typename... T>
consteval size_t place_of(const std::tuple<Type<T>...>& types, std::string_view name) {
  size_t place = 0;
  std::apply(
      [&](const auto&... type) { static_cast<void>(((type.name != name && ++place) && ...)); },
      types);
  return place;
}

template <const auto& Types, size_t Place>
using TypeAt = typename std::tuple_element_t<Place, std::remove_cvref_t<decltype(Types)>>::type;

template <Text Literal>
inline constexpr Schema kSchema{Literal.view()};

template <Text Literal, typename Arguments = std::make_index_sequence<kSchema<Literal>.size()>>
struct OperatorOf;

template <Text Literal, size_t... Index>
struct OperatorOf<Literal, std::index_sequence<Index...>> {
  static constexpr const char* kText = Literal.text;
  static constexpr Text<kSchema<Literal>.name.size() + 1> kNameText{kSchema<Literal>.name};
  static constexpr const char* kName = kNameText.text;
  static constexpr std::array<Schema::Argument, sizeof...(Index)> kArguments{
      kSchema<Literal>.argument(Index)...};

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
  using Argument = TypeAt<kPassed, place_of(kPassed, kArguments[I].type)>;
  using Result = TypeAt<kReturned, place_of(kReturned, kSchema<Literal>.result)>;

  /// What is called through the dispatcher.
  using Call = Result(Argument<Index>...);

  /// The arguments of a call, by their names in the schema. Tensors are the caller's.
  class Given {
   public:
    explicit Given(Argument<Index>... values) : values_(std::forward<Argument<Index>>(values)...) {}

    /// Those that a call of another operator has under the same names.
    template <typename Other>
    static Given of(const Other& other) {
      return Given(other.template at<Other::index_of(kArguments[Index].name)>()...);
    }

    static constexpr size_t index_of(std::string_view name) {
      return kSchema<Literal>.index_of(name);
    }

    template <size_t I>
    const auto& at() const {
      static_assert(I < sizeof...(Index), "the schema has no argument of this name");
      return std::get<I>(values_);
    }

    template <Text Name>
    const auto& get() const {
      return at<index_of(Name.view())>();
    }

    /// `otherwise` where the schema has no such argument.
    template <Text Name, typename T>
    T get_or(T otherwise) const {
      if constexpr (index_of(Name.view()) < sizeof...(Index)) {
        return get<Name>();
      } else {
        return otherwise;
      }
    }

    /// Calls `f` with all of them, in the order of the schema.
    template <typename F>
    Result apply(F f) const {
      return std::apply(f, values_);
    }

   private:
    std::tuple<Argument<Index>...> values_;
  };

  /// What is written for an operator: once, for the new tensor and for the caller's.
  using Run =
      std::conditional_t<kWritesMask, Result(const Output&, const Given&), Result(const Given&)>;
  /// What runs in its place where autograd records, if it is differentiable.
  using Autograd = Result(const Given&);
};

/// An operator's row of the table (operators.h) is a struct with this as its base.
template <Text... Parts>
using Operator = OperatorOf<joined<Parts...>()>;

}  // namespace ops
}  // namespace attn_mask
