#pragma once

// The kernels of one instruction set, which ATTN_MASK_ISA names; see CpuKernels. What is not forced
// inline is in a namespace of its own, so that no function compiled for a new processor is shared
// with code for older ones.

#include "cpu/kernels.h"

namespace attn_mask::ATTN_MASK_ISA {

void write_tiles(const MaskParams& params, const Tiling& tiling, int64_t begin, int64_t end);
void find_masked_rows(const Problem& problem, int64_t begin, int64_t end, uint8_t* rows);
void unmask_rows(const UnmaskParams& params, int64_t begin, int64_t end);
bool all(const StridedRows& rows, const KeyTest& test, int64_t row, int64_t begin, int64_t end);
void evaluate(const Problem& problem, const Query& query, uint32_t nodes, Interval columns,
              uint8_t* out);

}  // namespace attn_mask::ATTN_MASK_ISA
