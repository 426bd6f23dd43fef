#include "cpu/kernels.h"

#include "cpu/isa.h"

namespace attn_mask::ATTN_MASK_ISA {

const CpuKernels kKernels = {
    .write_tiles = &write_tiles,
    .find_masked_rows = &find_masked_rows,
    .unmask_rows = &unmask_rows,
    .all = &all,
    .evaluate = &evaluate,
};

}  // namespace attn_mask::ATTN_MASK_ISA
