#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include "rule/rule.h"

namespace attn_mask {

/// A rule as operators take it: a program of numbers in prefix order, and the tensors that it names
/// by index. Each line is a rule; `b` is the batch size, and 1 in its place repeats.
enum class Opcode : int64_t {
  kAll = 0,        // -                        every key
  kCausal = 1,     // -                        key <= q
  kWindow = 2,     // left, right              q - left <= key <= q + right; -1: no limit
  kChunk = 3,      // size, operand or -1      same chunk of `size` positions behind the padding [b]
  kBlocks = 4,     // operand                  ids[b, q] == ids[b, key] >= 0
  kPadding = 5,    // operand                  mask[b, key] is not zero
  kDocuments = 6,  // operand                  ids[b, q] == ids[b, key]
  kBits = 7,       // operand                  bits[b, heads or 1, row, column], bool
  kAnd = 8,        // n, n rules
  kOr = 9,         // n, n rules
  kReindex = 10,   // operand, rule            the rule at positions p[b, q], p[b, key]
  kShift = 11,     // q_add, key_add, rule     the rule at positions q + q_add, key + key_add
  kNothing = 12,   // -                        no key
};

/// What the program says. With `with_data` false (Meta) all is checked, but the rule points
/// nowhere.
struct DecodedRule {
  Rule rule;
  bool depends_on_batch;
  c10::SymInt heads;  // 1 unless bits have more
};

DecodedRule decode_rule(const char* op, c10::SymIntArrayRef program, at::TensorList operands,
                        const c10::SymInt& batch_size, const c10::SymInt& q_length,
                        const c10::SymInt& kv_length, at::Device device, bool with_data);

}  // namespace attn_mask
