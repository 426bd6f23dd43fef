#pragma once

#include <cuda_runtime_api.h>

#include "format/block_mask.h"
#include "format/mask_params.h"
#include "format/strided_rows.h"

namespace attn_mask {

/// Launches on `stream`; pointers in `params` are to device memory. Check cudaGetLastError after
/// each.
void launch_write_mask(const MaskParams& params, cudaStream_t stream);

void launch_find_masked_rows(const Problem& problem, uint8_t* rows, cudaStream_t stream);

void launch_find_block_states(const BlockMaskParams& params, cudaStream_t stream);

/// By the states in `params`.
void launch_write_block_mask(const BlockMaskParams& params, cudaStream_t stream);

void launch_unmask(const UnmaskParams& params, cudaStream_t stream);

}  // namespace attn_mask
