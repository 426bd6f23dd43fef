// libattn_mask_cuda: the CUDA kernels, registered when the library is loaded.

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/launch.h"
#include "ops/core/device_kernels.h"
#include "ops/core/register.h"

namespace attn_mask {
namespace {

/// A launch as operators call it: on the current stream.
template <auto Launch, typename Params>
void on_stream(const Params& params) {
  Launch(params, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void unmask_cuda(const UnmaskParams& params) {
  if (params.in.rows() != 0 && params.in.length != 0) {
    on_stream<&launch_unmask>(params);
  }
}

std::optional<LongestLines> write_block_mask_cuda(const BlockMaskParams& params) {
  on_stream<&launch_write_block_mask>(params);
  return std::nullopt;
}

constexpr DeviceKernels kKernels = {
    .write_mask = &on_stream<&launch_write_mask>,
    .prepare = &on_stream<&launch_prepare>,
    .find_masked_rows = nullptr,
    .unmask = &unmask_cuda,
    .find_documents = &on_stream<&launch_find_documents>,
    .find_block_states = &on_stream<&launch_find_block_states>,
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
