// libattn_mask_cuda: the CUDA kernels, registered when the library is loaded.

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/launch.h"
#include "ops/core/device_kernels.h"
#include "ops/core/register.h"

namespace attn_mask {
namespace {

void write_mask_cuda(const MaskParams& params) {
  launch_write_mask(params, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void prepare_cuda(const DeviceTables& tables) {
  launch_prepare(tables, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void unmask_cuda(const UnmaskParams& params) {
  if (params.in.rows() == 0 || params.in.length == 0) {
    return;
  }
  launch_unmask(params, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void find_block_states_cuda(const BlockMaskParams& params) {
  launch_find_block_states(params, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

std::optional<LongestLines> write_block_mask_cuda(const BlockMaskParams& params) {
  launch_write_block_mask(params, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return std::nullopt;
}

void find_documents_cuda(const DocumentParams& params) {
  launch_find_documents(params, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

constexpr DeviceKernels kKernels = {
    .write_mask = &write_mask_cuda,
    .prepare = &prepare_cuda,
    .find_masked_rows = nullptr,
    .unmask = &unmask_cuda,
    .find_documents = &find_documents_cuda,
    .find_block_states = &find_block_states_cuda,
    .write_block_mask = &write_block_mask_cuda,
    .needs_block_states = true,
};

const bool kRegistered = [] {
  register_device_kernels(c10::DeviceType::CUDA, kKernels);
  return true;
}();

TORCH_LIBRARY_IMPL(attn_mask, CUDA, m) { ops::register_all(m); }

}  // namespace
}  // namespace attn_mask
