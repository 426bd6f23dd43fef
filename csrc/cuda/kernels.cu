// Thin shells around the bodies. No ATen header: this file compiles in seconds.

#include "cuda/bodies.h"
#include "cuda/launch.h"

namespace attn_mask {
namespace {

__device__ GridPosition grid_position() { return {blockIdx.x, threadIdx.x, gridDim.x, blockDim.x}; }

template <typename T>
__global__ void __launch_bounds__(kThreadsPerBlock)
    write_mask_kernel(const MaskTask task, int64_t packs_per_row) {
  write_mask_body<T>(task, packs_per_row, grid_position());
}

template <typename T>
__global__ void __launch_bounds__(kThreadsPerBlock)
    find_attended_rows_kernel(const UnmaskTask task, uint8_t* attended) {
  find_attended_rows_body<T>(task, attended, grid_position());
}

template <typename T>
__global__ void __launch_bounds__(kThreadsPerBlock)
    unmask_kernel(const UnmaskTask task, const uint8_t* attended) {
  unmask_body<T>(task, attended, grid_position());
}

template <typename T>
void launch_write_mask(const MaskTask& task, cudaStream_t stream) {
  const int64_t per_row = packs_per_row<T>(task);
  const auto blocks = static_cast<unsigned int>(blocks_for(task.rows() * per_row));
  write_mask_kernel<T><<<blocks, kThreadsPerBlock, 0, stream>>>(task, per_row);
}

template <typename T>
void launch_unmask(const UnmaskTask& task, uint8_t* attended, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned int>(blocks_for(task.in.rows() * task.in.length));
  find_attended_rows_kernel<T><<<blocks, kThreadsPerBlock, 0, stream>>>(task, attended);
  unmask_kernel<T><<<blocks, kThreadsPerBlock, 0, stream>>>(task, attended);
}

}  // namespace

void launch_write_mask(const MaskTask& task, cudaStream_t stream) {
  switch (task.format.element_size) {
    case 1:
      return launch_write_mask<uint8_t>(task, stream);
    case 2:
      return launch_write_mask<uint16_t>(task, stream);
    case 4:
      return launch_write_mask<uint32_t>(task, stream);
    default:
      return launch_write_mask<uint64_t>(task, stream);
  }
}

void launch_unmask(const UnmaskTask& task, uint8_t* attended, cudaStream_t stream) {
  switch (task.in.element_size) {
    case 1:
      return launch_unmask<uint8_t>(task, attended, stream);
    case 2:
      return launch_unmask<uint16_t>(task, attended, stream);
    case 4:
      return launch_unmask<uint32_t>(task, attended, stream);
    default:
      return launch_unmask<uint64_t>(task, attended, stream);
  }
}

}  // namespace attn_mask
