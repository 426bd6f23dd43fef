#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <functional>

#include "rule/program.h"
#include "rule/rule.h"

namespace attn_mask {

/// A program, the tensors it names, and the mask that it is evaluated for.
struct RuleProgram {
  c10::SymIntArrayRef code;
  at::TensorList operands;
  c10::SymInt batch_size;
  c10::SymInt q_length;
  c10::SymInt kv_length;
};

/// What a program holds beside its rule.
struct Decoded {
  bool depends_on_batch;
  c10::SymInt heads;  // 1 unless bits have more
  bool has_parts;     // the tree was too large: the results of its parts replace them
};

/// A tensor [b or 1, h or 1, rows, kv_length], from one of its rows on, as a leaf.
Padding bits_leaf(const at::Tensor& bits, int64_t first_row, KeyTest visible);

/// A tensor [b or 1, length] as a leaf.
Padding padding_leaf(const at::Tensor& mask, KeyTest visible);

/// The results of a part of a rule, for each row and column of the mask.
using BitsOfPart = std::function<Padding(const Rule& part)>;

/// Validates a program and decodes it into `rule`, which the kernel owns. With `with_data` false
/// (Meta) the rule points nowhere. Kernels take trees of limited size: of a larger one the largest
/// branches are replaced by what `bits_of_part` returns. Without it, and where `has_parts`, the
/// rule is not to be used. `first_row`: where in the operands that have a row for each query the
/// mask's own rows begin.
Decoded decode_rule(const char* op, const RuleProgram& program, at::Device device, bool with_data,
                    Rule& rule, int64_t first_row = 0, const BitsOfPart& bits_of_part = {});

}  // namespace attn_mask
