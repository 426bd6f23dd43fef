#pragma once

#include <cuda_runtime_api.h>

#include "format/block_mask.h"
#include "format/mask_task.h"
#include "format/strided_rows.h"
#include "rule/device_tables.h"

namespace attn_mask {

/// Launches on `stream`; the task's pointers are device memory. Check cudaGetLastError after each.
void launch_write_mask(const MaskTask& task, cudaStream_t stream);

void launch_prepare(const DeviceTables& tables, cudaStream_t stream);

void launch_find_block_states(const BlockMaskTask& task, cudaStream_t stream);

/// By the task's states.
void launch_write_block_mask(const BlockMaskTask& task, cudaStream_t stream);

void launch_unmask(const UnmaskTask& task, cudaStream_t stream);

}  // namespace attn_mask
