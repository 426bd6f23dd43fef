#pragma once

#include <functional>

#include "cpu/blocks.h"
#include "format/block_mask.h"

namespace attn_mask {

/// Most block masks take less time than a thread that is busy elsewhere takes to come: there must
/// be some milliseconds for it to do.
inline constexpr int64_t kBlockGrains = 64;

/// Takes line `index`, counted through planes and blocks of queries; it is gone afterwards.
using VisitLine = std::function<void(int64_t index, const Line& line)>;

/// Finds every line, by the given states where there are any, among threads: `visitor` makes what
/// one thread visits lines with.
void for_each_line(const BlockMaskParams& params, const std::function<VisitLine()>& visitor);

}  // namespace attn_mask
