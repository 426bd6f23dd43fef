#pragma once

// What operators require of their arguments. Sizes are SymInts throughout, so that the same lines
// run for real tensors, under Meta and while tracing. Errors are the caller's: ValueError and
// TypeError, with a text that names operator, argument, expectation and what came.

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/core/SymInt.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string>

#include "rule/math/limits.h"

/// TORCH_CHECK_VALUE for a SymBool: while tracing with sizes known only at run time it becomes a
/// run-time assertion instead of a guard.
#define ATTN_MASK_CHECK_SYM_VALUE(condition, ...) \
  TORCH_CHECK_VALUE((condition).expect_true(__FILE__, __LINE__), __VA_ARGS__)

namespace attn_mask {

/// `3-D [2, 1, 7]`
std::string describe_sizes(const at::Tensor& tensor);

/// Where C++ calls without the dispatcher between: an undefined tensor is no tensor.
void check_defined(const char* op, const char* argument, const at::Tensor& tensor);
void check_defined(const char* op, const char* argument, const std::optional<at::Tensor>& tensor);

/// Only tensors whose elements lie at strides are read: no undefined, nested or sparse ones.
void check_strided(const char* op, const char* argument, const at::Tensor& tensor);

void check_rank(const char* op, const char* argument, const at::Tensor& tensor, int64_t rank,
                const char* shape);

/// `size` must not be negative.
void check_size(const char* op, const char* argument, const c10::SymInt& size);

/// Reads a `(batch_size, query_length)` argument.
struct InputShape {
  c10::SymInt batch_size;
  c10::SymInt q_length;
};
InputShape check_input_shape(const char* op, const char* argument, c10::SymIntArrayRef shape);

/// kv_length = query length + past, without overflow; with `fewer_keys` past may be negative.
c10::SymInt check_kv_length(const char* op, const c10::SymInt& q_length,
                            const c10::SymInt& past_key_values_length, bool fewer_keys = false);

/// A window is a positive number of keys; the text is upstream's.
void check_sliding_window(const std::optional<c10::SymInt>& sliding_window);

/// Additive masks exist in float16, bfloat16, float32 and float64.
void check_additive_dtype(const char* op, const char* argument, at::ScalarType dtype);

/// Dtypes that a mask may have: anything that can be cast to a real floating type.
void check_mask_dtype(const char* op, const char* argument, const at::Tensor& mask);

/// Ids and positions: uint8, int8 to int64.
void check_integer(const char* op, const char* argument, const at::Tensor& tensor);

/// Whether `device` is the one that the caller wanted: without an index any will do, and the CPU is
/// one whatever its index.
bool is_same_device(at::Device wanted, at::Device device);

/// The two must be on one device.
void check_same_device(const char* op, const char* argument, const at::Tensor& tensor,
                       const char* other_argument, const at::Tensor& other);

/// Offsets and shifts must be within kFar of 0; `argument`: the parts of their name.
template <typename... Argument>
void check_within_far(const char* op, int64_t value, const Argument&... argument) {
  TORCH_CHECK_VALUE(-kFar < value && value < kFar, op, ": expected ", argument...,
                    " to be within 2^59 of 0, but got ", value);
}

/// A mask of these sizes must be addressable: its bytes fit into 63 bits.
void check_addressable(const char* op, c10::SymIntArrayRef sizes, at::ScalarType dtype);

}  // namespace attn_mask
