#pragma once

#include "format/dense.h"

namespace attn_mask {

/// Torch's bool: true attends.
inline constexpr DenseFormat kBoolean = {1, 1, 0};

}  // namespace attn_mask
