#pragma once

#include <cuda_runtime_api.h>

#include "format/mask_task.h"
#include "format/strided_rows.h"

namespace attn_mask {

/// Launches on `stream`; the task's pointers are device memory. Check cudaGetLastError after each.
void launch_write_mask(const MaskTask& task, cudaStream_t stream);

/// `attended`: one zeroed byte of device memory for each row.
void launch_unmask(const UnmaskTask& task, uint8_t* attended, cudaStream_t stream);

}  // namespace attn_mask
