#pragma once

#include <cuda_runtime_api.h>

#include "format/block_mask.h"
#include "format/document_params.h"
#include "format/mask_params.h"
#include "format/strided_rows.h"
#include "rule/levels/device_tables.h"

namespace attn_mask {

/// Launches on `stream`; the parameters' pointers are device memory. Check cudaGetLastError after
/// each.
void launch_write_mask(const MaskParams& params, cudaStream_t stream);

void launch_prepare(const DeviceTables& tables, cudaStream_t stream);

void launch_find_block_states(const BlockMaskParams& params, cudaStream_t stream);

/// By the parameters' states.
void launch_write_block_mask(const BlockMaskParams& params, cudaStream_t stream);

void launch_find_documents(const DocumentParams& params, cudaStream_t stream);

void launch_unmask(const UnmaskParams& params, cudaStream_t stream);

}  // namespace attn_mask
