#include "ops/output.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/huge_pages.h"
#include "ops/checks.h"

namespace attn_mask {
namespace {

/// Whether it is certain that no two elements lie at the same place: each stride, from the smallest
/// on, reaches beyond all elements of those before it.
bool elements_are_apart(const at::Tensor& tensor) {
  if (tensor.numel() == 0) {
    return true;
  }
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) > 1) {
      dims.emplace_back(tensor.stride(i), tensor.size(i));
    }
  }
  std::ranges::sort(dims);
  int64_t reach = 0;
  for (const auto& [stride, size] : dims) {
    if (stride <= reach) {
      return false;
    }
    reach += stride * (size - 1);
  }
  return true;
}

}  // namespace

Output::Output(const char* op, c10::SymInt stride_multiple)
    : op_(op), stride_multiple_(std::move(stride_multiple)) {
  ATTN_MASK_CHECK_SYM_VALUE(
      stride_multiple_.sym_gt(0).sym_and(stride_multiple_.sym_le(std::numeric_limits<int>::max())),
      op, ": expected stride_multiple to be a number of elements from 1 to 2^31 - 1, but got ",
      stride_multiple_);
}

Output::Output(const char* op, const at::Tensor& out, at::TensorList inputs)
    : op_(op), given_(out) {
  TORCH_CHECK_VALUE(!(out.requires_grad() && c10::GradMode::is_enabled()), op,
                    ": expected out not to require a gradient, since masks have none");
  if (out.unsafeGetTensorImpl()->has_symbolic_sizes_strides() || out.is_meta()) {
    return;
  }
  TORCH_CHECK_VALUE(elements_are_apart(out), op,
                    ": expected out to have elements that don't overlap, but got strides ",
                    out.strides(), " for sizes ", out.sizes());
  for (const at::Tensor& input : inputs) {
    const at::MemOverlapStatus status = at::get_overlap_status(out, input);
    TORCH_CHECK_VALUE(
        status != at::MemOverlapStatus::Partial && status != at::MemOverlapStatus::Full, op,
        ": expected out to share no memory with the inputs, but it does with one of sizes ",
        input.sizes());
  }
}

at::ScalarType Output::dtype(std::optional<at::ScalarType> asked) const {
  return asked.value_or(given_ ? given_->scalar_type() : at::kFloat);
}

std::optional<at::Device> Output::device(std::optional<at::Device> asked) const {
  if (!given_) {
    return asked;
  }
  const at::Device of_out = given_->device();
  TORCH_CHECK_VALUE(
      !asked || (asked->type() == of_out.type() &&
                 (of_out.is_cpu() || !asked->has_index() || asked->index() == of_out.index())),
      op_, ": expected out to be on ", *asked, ", but got ", of_out);
  return of_out;
}

at::Tensor Output::mask(const c10::SymInt& batch_size, const c10::SymInt& heads,
                        const c10::SymInt& q_length, const c10::SymInt& kv_length,
                        at::ScalarType dtype, std::optional<at::Device> device) const {
  return tensor(std::array<c10::SymInt, 4>{batch_size, heads, q_length, kv_length}, dtype, device);
}

at::Tensor Output::like(const at::Tensor& tensor) const {
  return this->tensor(tensor.sym_sizes(), tensor.scalar_type(), tensor.device());
}

at::Tensor Output::tensor(c10::SymIntArrayRef sizes, at::ScalarType dtype,
                          std::optional<at::Device> device) const {
  if (given_) {
    const at::Tensor& out = *given_;
    TORCH_CHECK_TYPE(out.scalar_type() == dtype, op_, ": expected out to be ", dtype, ", but got ",
                     out.scalar_type());
    TORCH_CHECK_VALUE(!device || out.device() == *device, op_, ": expected out to be on ", *device,
                      ", but got ", out.device());
    TORCH_CHECK_VALUE(out.dim() == static_cast<int64_t>(sizes.size()), op_,
                      ": expected out to be of sizes ", sizes, ", but got ", describe_sizes(out));
    for (size_t i = 0; i < sizes.size(); ++i) {
      ATTN_MASK_CHECK_SYM_VALUE(out.sym_size(static_cast<int64_t>(i)).sym_eq(sizes[i]), op_,
                                ": expected out to be of sizes ", sizes, ", but got ",
                                describe_sizes(out));
    }
    if (!out.is_inference()) {
      out.unsafeGetTensorImpl()->bump_version();
    }
    return out;
  }
  check_addressable(op_, sizes, dtype);
  const at::TensorOptions options = at::TensorOptions().dtype(dtype).device(device);
  const bool as_it_is = stride_multiple_.maybe_as_int() == 1 || sizes.empty();
  at::Tensor stored;
  if (as_it_is) {
    stored = at::empty_symint(sizes, options);
  } else {
    std::vector<c10::SymInt> padded(sizes.begin(), sizes.end());
    // Less than 2^31 more than a size that is known to be addressable.
    padded.back() = (padded.back() + (stride_multiple_ - 1)) / stride_multiple_ * stride_multiple_;
    check_addressable(op_, padded, dtype);
    stored = at::empty_symint(padded, options);
  }
  if (stored.is_cpu()) {
    advise_huge_pages(stored.data_ptr(), static_cast<int64_t>(stored.nbytes()));
  }
  return as_it_is ? stored : stored.narrow_symint(-1, 0, sizes.back());
}

}  // namespace attn_mask
