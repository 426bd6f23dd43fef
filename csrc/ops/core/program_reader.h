#pragma once

#include "ops/core/rule_program.h"

namespace attn_mask {

/// Reads the numbers of a program one after the other, and checks the tensors that they name.
/// `what` names a number or a tensor in errors.
class ProgramReader {
 protected:
  ProgramReader(const char* op, const RuleProgram& program, at::Device device, bool with_data,
                int64_t first_row)
      : op_(op),
        program_(program.code),
        operands_(program.operands),
        batch_size_(program.batch_size),
        q_length_(program.q_length),
        kv_length_(program.kv_length),
        device_(device),
        with_data_(with_data),
        first_row_(first_row) {}

  int64_t number(const char* what);

  /// A number that only kernels need: while tracing it may be unknown, and `stand_in` will do.
  int64_t parameter(const char* what, int64_t stand_in);

  /// A number that shifts positions.
  int64_t distance(const char* what);

  const at::Tensor& operand(const char* what);

  // Leaves over an operand; without data they point nowhere.
  Table table(const char* what, const at::Tensor& tensor);
  Padding padding(const at::Tensor& tensor);
  Padding bits(const at::Tensor& tensor);

  void check_end() const;

  const char* op_;
  c10::SymIntArrayRef program_;
  size_t next_ = 0;
  bool depends_on_batch_ = false;
  c10::SymInt heads_ = 1;  // those of bits

 private:
  const c10::SymInt& symbolic();
  void check_batch(const char* what, const at::Tensor& tensor);

  at::TensorList operands_;
  const c10::SymInt& batch_size_;
  const c10::SymInt& q_length_;
  const c10::SymInt& kv_length_;
  at::Device device_;
  bool with_data_;
  int64_t first_row_;
};

}  // namespace attn_mask
