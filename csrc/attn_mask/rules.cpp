// GCC 12 takes the number in an empty std::optional<c10::SymInt> for read.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "attn_mask/rules.h"

#include <c10/util/SmallVector.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "attn_mask/attention.h"
#include "ops/core/call.h"
#include "ops/core/checks.h"
#include "ops/core/operators.h"
#include "rule/math/limits.h"
#include "rule/program.h"

namespace attn_mask {

namespace {

/// What a function that makes a rule is called, and its argument.
struct Source {
  const char* function;
  const char* argument;
};

enum class Line { kQueries, kKeys };

/// A table that holds something for each position of the queries or keys.
struct TableUse {
  size_t operand;
  Source source;
  Line line;
  int64_t add;  // to a position, before it is looked up
};

}  // namespace

/// A rule as operators take it (see rule/program.h). Room for most rules, since models make them in
/// each step.
struct MaskRule::Encoded {
  c10::SmallVector<c10::SymInt, 16> code;
  c10::SmallVector<at::Tensor, 4> operands;
  c10::SmallVector<size_t, 4> operand_places;  // where in the code the index of each operand is
  c10::SmallVector<TableUse, 4> uses;          // but of those that other tables look up

  static const Encoded& of(const MaskRule& rule) { return *rule.encoded_; }

  static MaskRule rule(Encoded encoded) {
    return MaskRule(std::make_shared<const Encoded>(std::move(encoded)));
  }
};

namespace {

using Encoded = MaskRule::Encoded;

void append(Encoded& to, Opcode opcode) { to.code.emplace_back(static_cast<int64_t>(opcode)); }

void append(Encoded& to, const at::Tensor& operand) {
  to.operand_places.push_back(to.code.size());
  to.code.emplace_back(static_cast<int64_t>(to.operands.size()));
  to.operands.push_back(operand);
}

/// Appends the code of `rule` from one of its numbers on.
void append(Encoded& to, const Encoded& rule, size_t begin = 0) {
  const size_t moved_by = to.code.size() - begin;
  const auto first_operand = static_cast<int64_t>(to.operands.size());
  to.code.append(rule.code.begin() + begin, rule.code.end());
  for (size_t i = 0; i < rule.operands.size(); ++i) {
    const size_t place = rule.operand_places[i] + moved_by;
    to.operand_places.push_back(place);
    to.code[place] = first_operand + static_cast<int64_t>(i);
    to.operands.push_back(rule.operands[i]);
  }
  for (TableUse use : rule.uses) {
    use.operand += static_cast<size_t>(first_operand);
    to.uses.push_back(use);
  }
}

/// Appends a table [b, n] that is looked up at the positions of keys, and of queries.
void append_table(Encoded& to, const at::Tensor& table, Source source, bool by_query) {
  for (const Line line : {Line::kQueries, Line::kKeys}) {
    if (by_query || line == Line::kKeys) {
      to.uses.push_back({to.operands.size(), source, line, 0});
    }
  }
  append(to, table);
}

MaskRule leaf(Opcode opcode) {
  Encoded encoded;
  append(encoded, opcode);
  return Encoded::rule(std::move(encoded));
}

/// What holds something for each position, as operators take it: [b, n], or [1, n] of [n].
at::Tensor rows_of(const char* name, const char* argument, const at::Tensor& table) {
  TORCH_CHECK_VALUE(table.dim() == 1 || table.dim() == 2, name, ": expected ", argument,
                    " to be 1-D [length] or 2-D [batch_size, length], but got ",
                    describe_sizes(table));
  return table.dim() == 1 ? table.unsqueeze(0) : table;
}

at::Tensor integers_of(Source source, const at::Tensor& table) {
  check_strided(source.function, source.argument, table);
  check_integer(source.function, source.argument, table);
  return rows_of(source.function, source.argument, table);
}

/// A rule over a table of integers.
MaskRule leaf(Opcode opcode, Source source, const at::Tensor& table) {
  Encoded encoded;
  append(encoded, opcode);
  append_table(encoded, integers_of(source, table), source, /*by_query=*/true);
  return Encoded::rule(std::move(encoded));
}

/// Numbers that move positions.
int64_t check_far(const char* name, const char* argument, int64_t distance) {
  check_within_far(name, distance, argument);
  return distance;
}

MaskRule window_leaf(int64_t left, int64_t right) {
  Encoded encoded;
  append(encoded, Opcode::kWindow);
  encoded.code.append({std::min(left, kOpen), std::min(right, kOpen)});
  return Encoded::rule(std::move(encoded));
}

MaskRule join(Opcode opcode, const MaskRule& a, const MaskRule& b) {
  constexpr size_t kHeader = 2;
  const Encoded& first = Encoded::of(a);
  const Encoded& second = Encoded::of(b);
  const auto is_joined = [&](const Encoded& rule) {
    return rule.code[0] == static_cast<int64_t>(opcode);
  };
  const auto size = [&](const Encoded& rule) {
    return is_joined(rule) ? rule.code[1].expect_int() : 1;
  };
  Encoded joined;
  append(joined, opcode);
  joined.code.emplace_back(size(first) + size(second));
  for (const Encoded* rule : {&first, &second}) {
    append(joined, *rule, is_joined(*rule) ? kHeader : 0);
  }
  return Encoded::rule(std::move(joined));
}

/// The positions in the options of function `name`, and that the rule's tables reach as far as they
/// do. Operators take it that what is in no table attends to nothing.
template <typename Options>
void check_positions(const char* name, const Encoded& rule, const Options& options,
                     const c10::SymInt& q_offset, const c10::SymInt& q_length,
                     const c10::SymInt& kv_length) {
  check_defined(name, "q_positions", options.q_positions);
  check_defined(name, "kv_positions", options.kv_positions);
  for (const TableUse& use : rule.uses) {
    const bool by_query = use.line == Line::kQueries;
    const auto length = (by_query ? q_length : kv_length).maybe_as_int();
    const auto offset = by_query ? q_offset.maybe_as_int() : std::optional(options.kv_offset);
    const auto reach = rule.operands[use.operand].sym_size(1).maybe_as_int();
    if ((by_query ? options.q_positions : options.kv_positions) || !length || *length <= 0 ||
        !offset || !reach) {
      continue;
    }
    const char* const line = by_query ? "queries" : "keys";
    int64_t first = 0;
    int64_t end = 0;
    TORCH_CHECK_VALUE(!__builtin_add_overflow(*offset, use.add, &first) &&
                          !__builtin_add_overflow(first, *length, &end) && end <= *reach,
                      use.source.function, ": expected ", use.source.argument, " to be of length ",
                      end, " or longer, for the ", line, " of ", name, ", but got ",
                      rule.operands[use.operand].sym_sizes());
    TORCH_CHECK_VALUE(first >= 0, use.source.function, ": expected ", use.source.argument,
                      " for positions from 0 on, but the ", line, " of ", name, " begin at ",
                      first);
  }
}

}  // namespace

MaskRule::MaskRule(std::shared_ptr<const Encoded> encoded) : encoded_(std::move(encoded)) {}

MaskRule MaskRule::to(at::Device device) const {
  Encoded moved = *encoded_;
  for (at::Tensor& operand : moved.operands) {
    operand = operand.to(device);
  }
  return Encoded::rule(std::move(moved));
}

MaskRule operator&(const MaskRule& a, const MaskRule& b) { return join(Opcode::kAnd, a, b); }

MaskRule operator|(const MaskRule& a, const MaskRule& b) { return join(Opcode::kOr, a, b); }

MaskRule causal() {
  static const MaskRule rule = leaf(Opcode::kCausal);
  return rule;
}

MaskRule bidirectional() {
  static const MaskRule rule = leaf(Opcode::kAll);
  return rule;
}

MaskRule nothing() {
  static const MaskRule rule = leaf(Opcode::kNothing);
  return rule;
}

MaskRule sliding_window(int64_t size) {
  TORCH_CHECK_VALUE(size > 0, "sliding_window: expected size to be positive, but got ", size);
  return window(size - 1, std::nullopt);
}

MaskRule window(std::optional<int64_t> left, std::optional<int64_t> right) {
  if (!left && !right) {
    return bidirectional();
  }
  const int64_t first = left ? std::min(*left, kOpen) : kAbsent;
  const int64_t last = right ? std::min(*right, kOpen) : kAbsent;
  for (const auto& [name, side] : {std::pair("left", left), std::pair("right", right)}) {
    TORCH_CHECK_VALUE(!side || *side > -kFar, "window: expected ", name,
                      " to be more than -2^59, or nothing for an open side, but got ", *side);
  }
  TORCH_CHECK_VALUE(!left || !right || first >= -last,
                    "window: expected left and right to leave a key visible (an open side is "
                    "nothing, not -1), but got ",
                    *left, " and ", *right);
  const bool is_after = left && first < 0;  // the window lies after the query
  const bool is_before = right && last < 0;
  if (left && right && (is_after || is_before)) {
    return window(left, std::nullopt) & window(std::nullopt, right);
  }
  // It would be taken for an open side.
  if (is_after) {
    return shift(window_leaf(0, kAbsent), -first, 0);
  }
  if (is_before) {
    return shift(window_leaf(kAbsent, 0), last, 0);
  }
  return window_leaf(first, last);
}

MaskRule chunked(int64_t size, const std::optional<at::Tensor>& left_padding) {
  TORCH_CHECK_VALUE(size != 0, "chunked: expected size not to be 0");
  TORCH_CHECK_VALUE(size > 0, "chunked: expected size to be positive, but got ", size);
  if (left_padding) {
    check_strided("chunked", "left_padding", *left_padding);
    check_integer("chunked", "left_padding", *left_padding);
    check_rank("chunked", "left_padding", *left_padding, 1, "[batch_size]");
  }
  Encoded encoded;
  append(encoded, Opcode::kChunk);
  encoded.code.emplace_back(std::min(size, kOpen));
  if (left_padding) {
    append(encoded, *left_padding);
  } else {
    encoded.code.emplace_back(kAbsent);
  }
  return Encoded::rule(std::move(encoded));
}

MaskRule blockwise(const at::Tensor& ids) {
  return leaf(Opcode::kBlocks, {"blockwise", "ids"}, ids);
}

MaskRule documents(const at::Tensor& ids) {
  return leaf(Opcode::kDocuments, {"documents", "ids"}, ids);
}

MaskRule padding(const at::Tensor& mask) {
  constexpr Source kSource{"padding", "mask"};
  check_strided(kSource.function, kSource.argument, mask);
  check_mask_dtype(kSource.function, kSource.argument, mask);
  Encoded encoded;
  append(encoded, Opcode::kPadding);
  append_table(encoded, rows_of(kSource.function, kSource.argument, mask), kSource,
               /*by_query=*/false);
  return Encoded::rule(std::move(encoded));
}

MaskRule bits(const at::Tensor& attends) {
  check_strided("bits", "attends", attends);
  TORCH_CHECK_TYPE(attends.scalar_type() == at::kBool,
                   "bits: expected attends to be bool, but got ", attends.scalar_type());
  check_rank("bits", "attends", attends, 4, "[batch_size, heads, q_length, kv_length]");
  Encoded encoded;
  append(encoded, Opcode::kBits);
  append(encoded, attends);
  return Encoded::rule(std::move(encoded));
}

MaskRule reindex(const MaskRule& rule, const at::Tensor& positions) {
  constexpr Source kSource{"reindex", "positions"};
  Encoded encoded;
  append(encoded, Opcode::kReindex);
  const at::Tensor table = integers_of(kSource, positions);
  append(encoded, table);
  append(encoded, Encoded::of(rule));
  // What is below is looked up at positions that are data.
  encoded.uses = {{0, kSource, Line::kQueries, 0}, {0, kSource, Line::kKeys, 0}};
  return Encoded::rule(std::move(encoded));
}

MaskRule shift(const MaskRule& rule, int64_t q_offset, int64_t kv_offset) {
  Encoded encoded;
  append(encoded, Opcode::kShift);
  encoded.code.append(
      {check_far("shift", "q_offset", q_offset), check_far("shift", "kv_offset", kv_offset)});
  append(encoded, Encoded::of(rule));
  for (TableUse& use : encoded.uses) {
    use.add += use.line == Line::kQueries ? q_offset : kv_offset;
  }
  return Encoded::rule(std::move(encoded));
}

at::Tensor additive(const MaskRule& rule, int64_t batch_size, int64_t q_length, int64_t kv_length,
                    const AdditiveOptions& options) {
  check_defined("additive", "bias", options.bias);
  const Encoded& encoded = Encoded::of(rule);
  check_positions("additive", encoded, options, options.q_offset, q_length, kv_length);
  const auto masked_value =
      options.masked_value ? std::optional<c10::Scalar>(*options.masked_value) : std::nullopt;
  return ops::call<ops::Additive>(
      encoded.code, encoded.operands, batch_size, q_length, kv_length, options.dtype,
      options.q_offset, options.kv_offset, options.q_positions, options.kv_positions, options.bias,
      options.device, options.unmask_unattended, masked_value, options.stride_multiple);
}

at::Tensor boolean(const MaskRule& rule, int64_t batch_size, int64_t q_length, int64_t kv_length,
                   const BooleanOptions& options) {
  const Encoded& encoded = Encoded::of(rule);
  check_positions("boolean", encoded, options, options.q_offset, q_length, kv_length);
  return ops::call<ops::Boolean>(encoded.code, encoded.operands, batch_size, q_length, kv_length,
                                 options.q_offset, options.kv_offset, options.q_positions,
                                 options.kv_positions, options.device, options.unmask_unattended,
                                 options.stride_multiple);
}

BlockMask block_mask(const MaskRule& rule, int64_t batch_size, int64_t q_length, int64_t kv_length,
                     const BlockMaskOptions& options) {
  const Encoded& encoded = Encoded::of(rule);
  check_positions("block_mask", encoded, options, options.q_offset, q_length, kv_length);
  const std::vector<at::Tensor> tensors = ops::call<ops::BlockMask>(
      encoded.code, encoded.operands, batch_size, options.heads, q_length, kv_length,
      options.q_block_size, options.kv_block_size, options.q_offset, options.kv_offset,
      options.q_positions, options.kv_positions, options.device,
      /*separate_full_blocks=*/true, std::nullopt, std::nullopt);
  return {tensors[0], tensors[1], tensors[2], tensors[3],           tensors[4],
          tensors[5], tensors[6], tensors[7], options.q_block_size, options.kv_block_size};
}

Attention scaled_dot_product_attention(const at::Tensor& query, const at::Tensor& key,
                                       const at::Tensor& value, const MaskRule& rule,
                                       const AttentionOptions& options) {
  constexpr auto kName = "scaled_dot_product_attention";
  for (const auto& [argument, tensor] : {std::pair("query", &query), {"key", &key}}) {
    check_strided(kName, argument, *tensor);
    check_rank(kName, argument, *tensor, 4, "[batch_size, heads, length, head size]");
  }
  check_defined(kName, "value", value);
  const Encoded& encoded = Encoded::of(rule);
  const c10::SymInt q_offset = options.q_offset
                                   ? c10::SymInt(*options.q_offset)
                                   : key.sym_size(2) - query.sym_size(2) + options.kv_offset;
  check_positions(kName, encoded, options, q_offset, query.sym_size(2), key.sym_size(2));
  auto [out, log_sum_exp] = ops::call<ops::ScaledDotProductAttention>(
      encoded.code, encoded.operands, query, key, value, q_offset, options.kv_offset,
      options.q_positions, options.kv_positions, options.scale, options.enable_gqa,
      options.max_documents, options.max_length);
  return {out, log_sum_exp};
}

}  // namespace attn_mask
