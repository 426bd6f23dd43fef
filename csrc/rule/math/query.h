#pragma once

#include <cstdint>

namespace attn_mask {

/// A row of the mask.
struct Query {
  int64_t batch;
  int64_t head;
  int64_t row;       // 0 <= row < q_length: where it is stored
  int64_t position;  // its position
};

/// A column of the mask.
struct Key {
  int64_t column;  // 0 <= column < kv_length: where it is stored
  int64_t position;
};

}  // namespace attn_mask
