#pragma once

#include <torch/library.h>

#include "macros.h"

namespace attn_mask::ops {

/// Registers every operator's function for the key of `m`.
ATTN_MASK_API void register_all(torch::Library& m);

}  // namespace attn_mask::ops
