#pragma once

// Typed calls through the dispatcher: what the C++ API and the pybind11 module use. They go through
// every dispatch key (modes, subclasses, tracing of the graph) but skip torch.ops' parsing of
// Python arguments. They need no symbol of the library: any that has registered the operators will
// do.

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>

#include "ops/core/operators.h"

namespace attn_mask::ops {

/// The operator in this process. Throws c10::Error where it has another signature.
template <typename Operator>
c10::TypedOperatorHandle<typename Operator::Call> find() {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string("attn_mask::") + Operator::kName).c_str(), "")
      .template typed<typename Operator::Call>();
}

/// Calls the operator with the arguments of its schema.
template <typename Operator, typename... Arguments>
typename Operator::Result call(Arguments&&... arguments) {
  static const auto op = find<Operator>();
  return op.call(std::forward<Arguments>(arguments)...);
}

/// The same with the arguments of a call that is being made.
template <typename Operator>
typename Operator::Result call_with(const typename Operator::Given& given) {
  return given.apply([](const auto&... arguments) { return call<Operator>(arguments...); });
}

/// The last argument of operators that write a mask: rows may begin anywhere.
inline constexpr int64_t kAnyStride = 1;

}  // namespace attn_mask::ops
