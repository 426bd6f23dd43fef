#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <functional>

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

/// A program, the tensors it names, and the mask that it is asked for.
struct RuleProgram {
  c10::SymIntArrayRef code;
  at::TensorList operands;
  const c10::SymInt& batch_size;
  const c10::SymInt& q_length;
  const c10::SymInt& kv_length;
};

/// What a program says beside its rule.
struct Decoded {
  bool depends_on_batch;
  c10::SymInt heads;  // 1 unless bits have more
  bool has_parts;     // the tree was too large: the answers of its parts stand in for them
};

/// A boolean tensor [b or 1, h or 1, rows, kv_length], from one of its rows on, as a leaf.
Padding bits_leaf(const at::Tensor& bits, int64_t first_row);

/// The answers of a part of a rule, for each row and column of the mask.
using BitsOfPart = std::function<Padding(const Rule& part)>;

/// Checks a program and writes it down as `rule`, a kernel's own. With `with_data` false (Meta) the
/// rule points nowhere. Kernels take trees of limited size: of a larger one the largest branches
/// are replaced by what `bits_of_part` answers. Without it, and where `has_parts`, the rule is not
/// to be used. `first_row`: where in the operands that have a row for each query the mask's own
/// rows begin.
Decoded decode_rule(const char* op, const RuleProgram& program, at::Device device, bool with_data,
                    Rule& rule, int64_t first_row = 0, const BitsOfPart& bits_of_part = {});

}  // namespace attn_mask
