#pragma once

#include "format/dense.h"
#include "rule/rule.h"

namespace attn_mask {

/// All that a kernel needs to write one dense mask: the rule, the question's extent and where and
/// how to write the answer.
struct MaskTask {
  Rule rule;
  int64_t batch_size;
  int64_t q_length;
  int64_t kv_length;
  int64_t q_offset;  // query i stands at position q_offset + i; key k at position k
  DenseFormat format;
  void* out;  // [batch_size, q_length, kv_length], contiguous
};

}  // namespace attn_mask
