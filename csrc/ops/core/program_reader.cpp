#include "ops/core/program_reader.h"

#include "ops/core/checks.h"
#include "ops/core/dtypes.h"

namespace attn_mask {
namespace {

constexpr int64_t kNowhere = 0;

/// In elements; 0 where one row serves the whole batch.
int64_t batch_stride(const at::Tensor& tensor) {
  return tensor.size(0) == 1 ? 0 : tensor.stride(0);
}

}  // namespace

Padding bits_leaf(const at::Tensor& bits, int64_t first_row, KeyTest visible) {
  const auto size = static_cast<int32_t>(bits.element_size());
  return {static_cast<const char*>(bits.const_data_ptr()) + first_row * bits.stride(2) * size,
          batch_stride(bits),
          bits.size(1) == 1 ? 0 : bits.stride(1),
          bits.stride(2),
          bits.stride(3),
          bits.size(3),
          size,
          /*by_column=*/true,
          visible};
}

Padding padding_leaf(const at::Tensor& mask, KeyTest visible) {
  return {mask.const_data_ptr(), batch_stride(mask),
          /*head_stride=*/0,
          /*q_stride=*/0,        mask.stride(1),
          mask.size(1),          static_cast<int32_t>(mask.element_size()),
          /*by_column=*/false,   visible};
}

const c10::SymInt& ProgramReader::symbolic() {
  TORCH_CHECK_VALUE(next_ < program_.size(), op_,
                    ": expected rule to be complete, but it ends after ", program_.size(),
                    " numbers");
  return program_[next_++];
}

int64_t ProgramReader::number(const char* what) {
  const size_t at = next_;
  const auto value = symbolic().maybe_as_int();
  TORCH_CHECK_VALUE(value.has_value(), op_, ": expected ", what, " at rule[", at,
                    "] to be a number known when the rule is made");
  return *value;
}

int64_t ProgramReader::parameter(const char* what, int64_t stand_in) {
  if (!with_data_ && next_ < program_.size() && !program_[next_].maybe_as_int()) {
    ++next_;
    return stand_in;
  }
  return number(what);
}

int64_t ProgramReader::distance(const char* what) {
  const size_t at = next_;
  const int64_t value = parameter(what, 0);
  check_within_far(op_, value, what, " at rule[", at, "]");
  return value;
}

const at::Tensor& ProgramReader::operand(const char* what) {
  const size_t at = next_;
  const int64_t index = number(what);
  TORCH_CHECK_VALUE(0 <= index && index < static_cast<int64_t>(operands_.size()), op_,
                    ": expected ", what, " at rule[", at, "] to be one of ", operands_.size(),
                    " operands, but got ", index);
  const at::Tensor& tensor = operands_[static_cast<size_t>(index)];
  TORCH_CHECK_VALUE(tensor.device() == device_, op_, ": expected ", what, " to be on ", device_,
                    ", but got ", tensor.device());
  return tensor;
}

void ProgramReader::check_batch(const char* what, const at::Tensor& tensor) {
  const c10::SymInt& rows = tensor.sym_size(0);
  if (rows.maybe_as_int() == 1) {
    return;
  }
  ATTN_MASK_CHECK_SYM_VALUE(rows.sym_eq(batch_size_), op_, ": expected ", what,
                            " to have a batch size of 1 or ", batch_size_, ", but got ",
                            describe_sizes(tensor));
  depends_on_batch_ = true;
}

Table ProgramReader::table(const char* what, const at::Tensor& tensor) {
  check_integer(op_, what, tensor);
  check_rank(op_, what, tensor, 2, "[batch_size, length]");
  check_batch(what, tensor);
  Table result{};
  if (with_data_) {
    // A table without rows is never looked at; one without columns holds no position.
    result.numbers = integers_of(tensor);
    if (tensor.numel() == 0) {
      result.numbers.data = &kNowhere;
    }
    result.batch_stride = batch_stride(tensor);
    result.stride = tensor.stride(1);
    result.length = tensor.size(1);
  }
  return result;
}

Padding ProgramReader::padding(const at::Tensor& tensor) {
  check_mask_dtype(op_, "a padding operand", tensor);
  check_rank(op_, "a padding operand", tensor, 2, "[batch_size, kv_length]");
  check_batch("a padding operand", tensor);
  Padding result{};
  if (with_data_) {
    result = padding_leaf(tensor, is_nonzero(tensor.scalar_type()));
  }
  return result;
}

Padding ProgramReader::bits(const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kBool, op_,
                   ": expected a bits operand to be bool, but got ", tensor.scalar_type());
  check_rank(op_, "a bits operand", tensor, 4, "[batch_size, heads, q_length, kv_length]");
  check_batch("a bits operand", tensor);
  const c10::SymInt& heads = tensor.sym_size(1);
  if (heads.maybe_as_int() != 1) {
    if (heads_.maybe_as_int() == 1) {
      heads_ = heads;
    }
    ATTN_MASK_CHECK_SYM_VALUE(heads.sym_eq(heads_), op_, ": expected bits operands to have 1 or ",
                              heads_, " heads, but got ", describe_sizes(tensor));
  }
  const std::array<c10::SymInt, 2> expected{q_length_, kv_length_};
  for (int64_t i = 0; i < 2; ++i) {
    ATTN_MASK_CHECK_SYM_VALUE(tensor.sym_size(i + 2).sym_eq(expected[static_cast<size_t>(i)]), op_,
                              ": expected a bits operand to be [batch_size, heads, ", q_length_,
                              ", ", kv_length_, "], but got ", describe_sizes(tensor));
  }
  Padding result{};
  if (with_data_) {
    result = bits_leaf(tensor, first_row_, is_nonzero(at::kBool));
  }
  return result;
}

void ProgramReader::check_end() const {
  TORCH_CHECK_VALUE(next_ == program_.size(), op_, ": expected rule to end after ", next_,
                    " numbers, but got ", program_.size());
}

}  // namespace attn_mask
