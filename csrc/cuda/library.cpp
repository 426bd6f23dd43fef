// libattn_mask_cuda: the CUDA kernels, registered when the library is loaded.

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/launch.h"
#include "ops/kernels.h"
#include "ops/register.h"

namespace attn_mask {
namespace {

void write_mask_cuda(const MaskTask& task) {
  if (task.rows() == 0 || task.kv_length == 0) {
    return;
  }
  launch_write_mask(task, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void find_next_visible_cuda(const Padding& padding, int64_t batch_size, int64_t* next) {
  launch_find_next_visible(padding, batch_size, next, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void unmask_cuda(const UnmaskTask& task) {
  if (task.in.rows() == 0 || task.in.length == 0) {
    return;
  }
  launch_unmask(task, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void find_block_states_cuda(const BlockMaskTask& task) {
  if (task.planes() * task.q_blocks() * task.kv_blocks() == 0) {
    return;
  }
  launch_find_block_states(task, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

std::optional<LongestLines> write_block_mask_cuda(const BlockMaskTask& task) {
  if (task.planes() * (task.q_blocks() + task.kv_blocks()) != 0) {
    launch_write_block_mask(task, c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return std::nullopt;
}

const bool kRegistered = [] {
  register_device_kernels(c10::DeviceType::CUDA,
                          {&write_mask_cuda, &find_next_visible_cuda, &unmask_cuda,
                           &find_block_states_cuda, &write_block_mask_cuda,
                           /*needs_block_states=*/true});
  return true;
}();

TORCH_LIBRARY_IMPL(attn_mask, CUDA, m) { ops::register_all(m); }

}  // namespace
}  // namespace attn_mask
