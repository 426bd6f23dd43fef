#include "ops/core/checks.h"

#include <algorithm>
#include <sstream>

#include "ops/core/dtypes.h"

namespace attn_mask {

std::string describe_sizes(const at::Tensor& tensor) {
  std::ostringstream text;
  text << tensor.dim() << "-D " << tensor.sym_sizes();
  return text.str();
}

void check_defined(const char* op, const char* argument, const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.defined(), op, ": expected ", argument,
                   " to be a tensor, but got an undefined one");
}

void check_defined(const char* op, const char* argument, const std::optional<at::Tensor>& tensor) {
  if (tensor) {
    check_defined(op, argument, *tensor);
  }
}

void check_strided(const char* op, const char* argument, const at::Tensor& tensor) {
  check_defined(op, argument, tensor);
  TORCH_CHECK_TYPE(!tensor.is_nested(), op, ": expected ", argument,
                   " to be a strided tensor, but got a nested one");
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, op, ": expected ", argument,
                   " to be a strided tensor, but got layout ", tensor.layout());
}

void check_rank(const char* op, const char* argument, const at::Tensor& tensor, int64_t rank,
                const char* shape) {
  TORCH_CHECK_VALUE(tensor.dim() == rank, op, ": expected ", argument, " to be ", rank, "-D ",
                    shape, ", but got ", describe_sizes(tensor));
}

void check_size(const char* op, const char* argument, const c10::SymInt& size) {
  ATTN_MASK_CHECK_SYM_VALUE(size.sym_ge(0), op, ": expected ", argument,
                            " to be a size (>= 0), but got ", size);
}

InputShape check_input_shape(const char* op, const char* argument, c10::SymIntArrayRef shape) {
  TORCH_CHECK_VALUE(shape.size() == 2, op, ": expected ", argument,
                    " to be (batch_size, query_length), but got ", shape);
  for (const c10::SymInt& size : shape) {
    ATTN_MASK_CHECK_SYM_VALUE(size.sym_ge(0), op, ": expected ", argument,
                              " to be (batch_size, query_length), both >= 0, but got ", shape);
  }
  return {shape[0], shape[1]};
}

c10::SymInt check_kv_length(const char* op, const c10::SymInt& q_length,
                            const c10::SymInt& past_key_values_length, bool fewer_keys) {
  if (!fewer_keys) {
    check_size(op, "past_key_values_length", past_key_values_length);
  }
  const auto q = q_length.maybe_as_int();
  const auto past = past_key_values_length.maybe_as_int();
  int64_t sum = 0;
  TORCH_CHECK_VALUE(
      !q || !past || !__builtin_add_overflow(*q, *past, &sum), op,
      ": expected query_length + past_key_values_length to fit into 64 bits, but got ", q_length,
      " + ", past_key_values_length);
  return q_length + past_key_values_length;
}

void check_sliding_window(const std::optional<c10::SymInt>& sliding_window) {
  if (sliding_window) {
    ATTN_MASK_CHECK_SYM_VALUE(sliding_window->sym_gt(0),
                              "Make sure that when passing `sliding_window` that its value is a "
                              "strictly positive integer, not `",
                              *sliding_window, "`");
  }
}

void check_additive_dtype(const char* op, const char* argument, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(is_additive_dtype(dtype), op, ": expected ", argument,
                   " to be float16, bfloat16, float32 or float64, but got ", dtype);
}

void check_mask_dtype(const char* op, const char* argument, const at::Tensor& mask) {
  TORCH_CHECK_TYPE(is_mask_dtype(mask.scalar_type()), op, ": expected ", argument,
                   " to be of a boolean, integer or real floating dtype, but got ",
                   mask.scalar_type());
}

void check_integer(const char* op, const char* argument, const at::Tensor& tensor) {
  const at::ScalarType dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kByte || dtype == at::kChar || dtype == at::kShort ||
                       dtype == at::kInt || dtype == at::kLong,
                   op, ": expected ", argument, " to be uint8 or a signed integer, but got ",
                   dtype);
}

bool is_same_device(at::Device wanted, at::Device device) {
  return wanted.type() == device.type() &&
         (device.is_cpu() || !wanted.has_index() || wanted.index() == device.index());
}

void check_same_device(const char* op, const char* argument, const at::Tensor& tensor,
                       const char* other_argument, const at::Tensor& other) {
  TORCH_CHECK_VALUE(tensor.device() == other.device(), op, ": expected ", argument,
                    " to be on the device of ", other_argument, ", which is ", other.device(),
                    ", but got ", tensor.device());
}

void check_addressable(const char* op, c10::SymIntArrayRef sizes, at::ScalarType dtype) {
  int64_t bytes = static_cast<int64_t>(c10::elementSize(dtype));
  bool fits = true;
  for (const c10::SymInt& size : sizes) {
    const auto known = size.maybe_as_int();
    if (!known) {
      return;  // checked when it is known
    }
    // Strides are products, too, in which a size of 0 counts as 1.
    fits = fits && !__builtin_mul_overflow(bytes, std::max<int64_t>(*known, 1), &bytes);
  }
  TORCH_CHECK_VALUE(fits, op, ": expected a mask of less than 2^63 bytes, but got sizes ", sizes,
                    " of ", dtype);
}

}  // namespace attn_mask
