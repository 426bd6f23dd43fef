#pragma once

#include "cpu/kernels.h"
#include "format/mask_task.h"
#include "format/strided_rows.h"

namespace attn_mask {

/// The kernels for this processor.
const CpuKernels& cpu_kernels();

/// How many items a thread should take at least that write so many bytes each.
int64_t grain_of(int64_t bytes_per_item);

/// Writes a whole mask to host memory, with torch's intra-op threads.
void write_mask_cpu(const MaskTask& task);

/// Says of each row whether no key is visible in it, [batch_size, heads, q_length].
void find_masked_rows_cpu(const Question& question, uint8_t* rows);

/// Copies and opens all rows in host memory, with torch's intra-op threads.
void unmask_cpu(const UnmaskTask& task);

/// Whether `test` holds for every element; stops soon after the first for which it does not.
bool all_cpu(const StridedRows& rows, const KeyTest& test);

}  // namespace attn_mask
