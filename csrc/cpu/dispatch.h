#pragma once

#include <functional>
#include <optional>

#include "cpu/kernels.h"
#include "format/block_mask.h"
#include "format/document_params.h"
#include "format/mask_params.h"
#include "format/strided_rows.h"

namespace attn_mask {

/// The kernels for this processor.
const CpuKernels& cpu_kernels();

/// Waking a second thread costs as much as writing about this much.
inline constexpr int64_t kGrainBytes = 128 * 1024;

/// Calls `f(begin, end)` for parts of `[0, items)`, with torch's intra-op threads, each with items
/// that write kGrainBytes at least.
void parallel_for(int64_t items, int64_t bytes_per_item,
                  const std::function<void(int64_t begin, int64_t end)>& f);

/// How many threads those are at most.
int64_t threads();

/// Writes a whole mask to host memory, with torch's intra-op threads.
void write_mask_cpu(const MaskParams& params);

/// Writes for each row whether no key is visible in it, [batch_size, heads, q_length].
void find_masked_rows_cpu(const Problem& problem, uint8_t* rows);

/// Copies all rows in host memory and unmasks those that are masked throughout, with torch's
/// intra-op threads.
void unmask_cpu(const UnmaskParams& params);

/// Finds the documents of ids in host memory.
void find_documents_cpu(const DocumentParams& params);

/// Writes the states of all blocks to host memory, with torch's intra-op threads.
void find_block_states_cpu(const BlockMaskParams& params);

/// Writes the lists of a block mask to host memory, with torch's intra-op threads: by its states
/// where there are any, else straight from the rule, in O(rows + blocks) where rows have spans.
/// What it returns may be more than fits into the widths given.
std::optional<LongestLines> write_block_mask_cpu(const BlockMaskParams& params);

/// Whether `test` holds for every element; stops soon after the first for which it does not.
bool all_cpu(const StridedRows& rows, const KeyTest& test);

}  // namespace attn_mask
