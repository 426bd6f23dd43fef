#include "ops/core/output.h"

#include <ATen/EmptyTensor.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/core/DimVector.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/huge_pages.h"
#include "ops/core/checks.h"

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

/// The next multiple; it is less than 2^31 more than a size that is known to be addressable.
c10::SymInt round_up(const c10::SymInt& size, const c10::SymInt& multiple) {
  return (size + (multiple - 1)) / multiple * multiple;
}

/// Whether the two may have memory in common: certain, or, where they have gaps, that one begins
/// before the other ends.
bool share_memory(const at::Tensor& a, const at::Tensor& b) {
  const at::MemOverlapStatus status = at::get_overlap_status(a, b);
  if (status != at::MemOverlapStatus::TooHard) {
    return status != at::MemOverlapStatus::No;
  }
  if (!a.has_storage() || !b.has_storage() || !a.is_alias_of(b)) {
    return false;
  }
  const auto extent = [](const at::Tensor& tensor) {
    int64_t last = 0;
    for (int64_t i = 0; i < tensor.dim(); ++i) {
      last += (tensor.size(i) - 1) * tensor.stride(i);
    }
    const int64_t first = tensor.storage_offset();
    const int64_t size = static_cast<int64_t>(tensor.element_size());
    return std::pair(first * size, (first + last + 1) * size);
  };
  const auto [a_begin, a_end] = extent(a);
  const auto [b_begin, b_end] = extent(b);
  return a.numel() != 0 && b.numel() != 0 && a_begin < b_end && b_begin < a_end;
}

/// Whether the two are the same elements at the same places.
bool lie_alike(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() &&
         a.strides() == b.strides() && a.const_data_ptr() == b.const_data_ptr();
}

/// at::empty, on the CPU without the dispatcher, which has already dispatched the operator. (Fake
/// tensors run Meta kernels with other devices.)
at::Tensor new_tensor(c10::SymIntArrayRef sizes, const at::TensorOptions& options) {
  const auto known = c10::asIntArrayRefSlowOpt(sizes);
  if (known && options.device().is_cpu() &&
      !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Meta)) {
    return at::Tensor(at::detail::empty_cpu(*known, options));
  }
  return at::empty_symint(sizes, options);
}

}  // namespace

Output::Output(const char* op, c10::SymInt stride_multiple)
    : op_(op), stride_multiple_(std::move(stride_multiple)) {
  ATTN_MASK_CHECK_SYM_VALUE(
      stride_multiple_.sym_gt(0).sym_and(stride_multiple_.sym_le(std::numeric_limits<int>::max())),
      op, ": expected stride_multiple to be a number of elements from 1 to 2^31 - 1, but got ",
      stride_multiple_);
}

Output::Output(const char* op, const at::Tensor& out, at::TensorList inputs, bool in_place)
    : op_(op), given_(out) {
  check_defined(op, "out", out);
  TORCH_CHECK_VALUE(!(out.requires_grad() && c10::GradMode::is_enabled()), op,
                    ": expected out not to require a gradient, since masks have none");
  if (out.unsafeGetTensorImpl()->has_symbolic_sizes_strides() || out.is_meta()) {
    return;
  }
  TORCH_CHECK_VALUE(elements_are_apart(out), op,
                    ": expected out to have elements that don't overlap, but got strides ",
                    out.strides(), " for sizes ", out.sizes());
  TORCH_CHECK_VALUE(out.numel() == 0 ||
                        reinterpret_cast<uintptr_t>(out.const_data_ptr()) % out.element_size() == 0,
                    op, ": expected out to begin at a multiple of its elements' size of ",
                    out.element_size(), " bytes, but it does not");
  for (const at::Tensor& input : inputs) {
    TORCH_CHECK_VALUE(
        (in_place && lie_alike(out, input)) || !share_memory(out, input), op,
        ": expected out to share no memory with the inputs, but it does with one of sizes ",
        input.sizes());
  }
}

void Output::check_no_gradient(const char* argument, const at::Tensor& input) const {
  TORCH_CHECK_VALUE(!is_given() || !(input.requires_grad() && c10::GradMode::is_enabled()), op_,
                    ": expected ", argument, " not to require a gradient where out is given");
}

at::ScalarType Output::dtype(std::optional<at::ScalarType> wanted) const {
  if (wanted) {
    return *wanted;
  }
  check_additive_dtype(op_, "out", given_->scalar_type());
  return given_->scalar_type();
}

at::Device Output::device(std::optional<at::Device> wanted) const {
  const at::Device of_out = given_->device();
  // Fake tensors run Meta kernels, for which all tensors are meta, on behalf of any device.
  const bool is_fake = c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Meta);
  TORCH_CHECK_VALUE(!wanted || is_fake || is_same_device(*wanted, of_out), op_,
                    ": expected out to be on ", *wanted, ", but got ", of_out);
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
    stored = new_tensor(sizes, options);
  } else {
    std::vector<c10::SymInt> padded(sizes.begin(), sizes.end());
    padded.back() = round_up(padded.back(), stride_multiple_);
    check_addressable(op_, padded, dtype);
    stored = new_tensor(padded, options);
  }
  if (stored.is_cpu()) {
    advise_huge_pages(stored.data_ptr(), static_cast<int64_t>(stored.nbytes()));
  }
  return as_it_is ? stored : stored.narrow_symint(-1, 0, sizes.back());
}

at::Tensor with_batch_of(const at::Tensor& mask, const c10::SymInt& batch_size) {
  const auto known = batch_size.maybe_as_int();
  if (known == 1) {
    return mask;
  }
  if (!known || mask.is_meta()) {
    std::vector<c10::SymInt> sizes = mask.sym_sizes().vec();
    sizes.front() = batch_size;
    return mask.expand_symint(sizes);
  }
  // It has no other owner yet, and expand costs as much as writing a small mask.
  at::DimVector sizes(mask.sizes());
  at::DimVector strides(mask.strides());
  sizes.front() = *known;
  strides.front() = 0;
  mask.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
  return mask;
}

at::Tensor with_stride_multiple(const at::Tensor& mask, const c10::SymInt& stride_multiple) {
  if (stride_multiple.maybe_as_int() == 1 || mask.dim() == 0) {
    return mask;
  }
  const c10::SymInt length = mask.sym_size(-1);
  const std::array<c10::SymInt, 2> missing{0, round_up(length, stride_multiple) - length};
  return at::constant_pad_nd_symint(mask, missing).narrow_symint(-1, 0, length);
}

}  // namespace attn_mask
