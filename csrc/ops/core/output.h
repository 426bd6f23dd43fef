#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>

namespace attn_mask {

/// Where an operator's mask goes: into a new tensor, or into one of the caller's (`.out`).
class Output {
 public:
  /// A new tensor, whose rows begin a multiple of `stride_multiple` (> 0) elements apart.
  Output(const char* op, c10::SymInt stride_multiple);

  /// `out`, of any strides that keep its elements apart (each reaching beyond all smaller ones),
  /// and apart from the operator's inputs (with gaps: from the first to the last of their
  /// elements). `in_place`: an input may also lie exactly where `out` does.
  Output(const char* op, const at::Tensor& out, at::TensorList inputs, bool in_place);

  /// The operator's name, for errors.
  const char* op() const { return op_; }

  bool is_given() const { return given_.has_value(); }

  /// Into a given tensor no gradient is recorded: an input that needs one is the caller's error, as
  /// everywhere in torch.
  void check_no_gradient(const char* argument, const at::Tensor& input) const;

  /// The dtype argument, or that of a given tensor.
  at::ScalarType dtype(std::optional<at::ScalarType> wanted) const;

  /// The device of a given tensor, which must be that of the argument.
  at::Device device(std::optional<at::Device> wanted) const;

  /// A mask to be written, [batch_size, heads, q_length, kv_length]; a given one must be just that.
  at::Tensor mask(const c10::SymInt& batch_size, const c10::SymInt& heads,
                  const c10::SymInt& q_length, const c10::SymInt& kv_length, at::ScalarType dtype,
                  std::optional<at::Device> device) const;

  /// The same with the sizes, dtype and device of a tensor of any rank.
  at::Tensor like(const at::Tensor& tensor) const;

 private:
  at::Tensor tensor(c10::SymIntArrayRef sizes, at::ScalarType dtype,
                    std::optional<at::Device> device) const;

  const char* op_;
  c10::SymInt stride_multiple_ = 1;
  std::optional<at::Tensor> given_;
};

/// A new mask [1, ...], seen as one of `batch_size` equal batch rows (stride 0).
at::Tensor with_batch_of(const at::Tensor& mask, const c10::SymInt& batch_size);

/// `mask` as it is, or copied so that its rows begin a multiple of `stride_multiple` elements
/// apart. Differentiable.
at::Tensor with_stride_multiple(const at::Tensor& mask, const c10::SymInt& stride_multiple);

}  // namespace attn_mask
