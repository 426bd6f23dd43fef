#include "ops/rule_program.h"

#include <algorithm>
#include <iterator>
#include <memory>
#include <vector>

#include "ops/checks.h"
#include "ops/dtypes.h"

namespace attn_mask {
namespace {

bool same_numbers(const Table& a, const Table& b) {
  return a.numbers.data == b.numbers.data && a.numbers.width == b.numbers.width &&
         a.batch_stride == b.batch_stride && a.stride == b.stride && a.length == b.length;
}

bool same_step(const Rule::Step& a, const Rule::Step& b) {
  return a.q_add == b.q_add && a.key_add == b.key_add && same_numbers(a.table, b.table);
}

/// Writes a program down as a rule. Complete subtrees lie one after the other in its nodes until
/// the `and` or `or` over them follows.
class Decoder {
 public:
  Decoder(const char* op, const RuleProgram& program, at::Device device, bool with_data,
          int64_t first_row, const BitsOfPart& bits_of_part, Rule& rule, Decoded& result)
      : op_(op),
        program_(program.code),
        operands_(program.operands),
        batch_size_(program.batch_size),
        q_length_(program.q_length),
        kv_length_(program.kv_length),
        device_(device),
        with_data_(with_data),
        first_row_(first_row),
        bits_of_part_(bits_of_part),
        rule_(rule),
        result_(result) {
    rule_.size = 0;
    rule_.steps_size = 0;
    result_.heads = 1;
  }

  void decode() {
    subtree(/*conjunct=*/true, 0);
    TORCH_CHECK_VALUE(next_ == program_.size(), op_, ": expected rule to end after ", next_,
                      " numbers, but got ", program_.size());
  }

 private:
  const c10::SymInt& symbolic() {
    TORCH_CHECK_VALUE(next_ < program_.size(), op_,
                      ": expected rule to be complete, but it ends after ", program_.size(),
                      " numbers");
    return program_[next_++];
  }

  int64_t number(const char* what) {
    const size_t at = next_;
    const auto value = symbolic().maybe_as_int();
    TORCH_CHECK_VALUE(value.has_value(), op_, ": expected ", what, " at rule[", at,
                      "] to be a number known when the rule is made");
    return *value;
  }

  /// A number that only kernels need: while tracing it may be unknown, and `stand_in` will do.
  int64_t parameter(const char* what, int64_t stand_in) {
    if (!with_data_ && next_ < program_.size() && !program_[next_].maybe_as_int()) {
      ++next_;
      return stand_in;
    }
    return number(what);
  }

  /// A number that shifts positions.
  int64_t distance(const char* what) {
    const size_t at = next_;
    const int64_t value = parameter(what, 0);
    check_within_far(op_, value, what, " at rule[", at, "]");
    return value;
  }

  const at::Tensor& operand(const char* what) {
    const size_t at = next_;
    const int64_t index = number(what);
    TORCH_CHECK_VALUE(0 <= index && index < static_cast<int64_t>(operands_.size()), op_,
                      ": expected ", what, " at rule[", at, "] to be one of ", operands_.size(),
                      " operands, but got ", index);
    const at::Tensor& tensor = operands_[static_cast<size_t>(index)];
    TORCH_CHECK_VALUE(tensor.device() == device_, op_, ": expected ", what, " to be on ", device_,
                      ", but got ", tensor.device());
    return tensor;
  }

  void check_batch(const char* what, const at::Tensor& tensor) {
    const c10::SymInt& rows = tensor.sym_size(0);
    if (rows.maybe_as_int() == 1) {
      return;
    }
    ATTN_MASK_CHECK_SYM_VALUE(rows.sym_eq(batch_size_), op_, ": expected ", what,
                              " to have a batch size of 1 or ", batch_size_, ", but got ",
                              describe_sizes(tensor));
    result_.depends_on_batch = true;
  }

  int64_t batch_stride(const at::Tensor& tensor) const {
    return tensor.size(0) == 1 ? 0 : tensor.stride(0);
  }

  Table table(const char* what, const at::Tensor& tensor) {
    check_integer(op_, what, tensor);
    check_rank(op_, what, tensor, 2, "[batch_size, length]");
    check_batch(what, tensor);
    Table result{};
    if (with_data_) {
      // A table without rows is never looked at; one without columns holds no position.
      result.numbers = integers_of(tensor);
      if (tensor.numel() == 0) {
        result.numbers.data = &kNowhere;
      }
      result.batch_stride = batch_stride(tensor);
      result.stride = tensor.stride(1);
      result.length = tensor.size(1);
    }
    return result;
  }

  Padding padding(const at::Tensor& tensor) {
    check_mask_dtype(op_, "a padding operand", tensor);
    check_rank(op_, "a padding operand", tensor, 2, "[batch_size, kv_length]");
    check_batch("a padding operand", tensor);
    Padding result{};
    if (with_data_) {
      result = {tensor.const_data_ptr(), batch_stride(tensor),
                /*head_stride=*/0,
                /*q_stride=*/0,          tensor.stride(1),
                tensor.size(1),          static_cast<int32_t>(tensor.element_size()),
                /*by_column=*/false,     is_nonzero(tensor.scalar_type())};
    }
    return result;
  }

  Padding bits(const at::Tensor& tensor) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == at::kBool, op_,
                     ": expected a bits operand to be bool, but got ", tensor.scalar_type());
    check_rank(op_, "a bits operand", tensor, 4, "[batch_size, heads, q_length, kv_length]");
    check_batch("a bits operand", tensor);
    const c10::SymInt& heads = tensor.sym_size(1);
    if (heads.maybe_as_int() != 1) {
      if (result_.heads.maybe_as_int() == 1) {
        result_.heads = heads;
      }
      ATTN_MASK_CHECK_SYM_VALUE(heads.sym_eq(result_.heads), op_,
                                ": expected bits operands to have 1 or ", result_.heads,
                                " heads, but got ", describe_sizes(tensor));
    }
    const std::array<c10::SymInt, 2> expected{q_length_, kv_length_};
    for (int64_t i = 0; i < 2; ++i) {
      ATTN_MASK_CHECK_SYM_VALUE(tensor.sym_size(i + 2).sym_eq(expected[static_cast<size_t>(i)]),
                                op_, ": expected a bits operand to be [batch_size, heads, ",
                                q_length_, ", ", kv_length_, "], but got ", describe_sizes(tensor));
    }
    Padding result{};
    if (with_data_) {
      result = bits_leaf(tensor, first_row_);
    }
    return result;
  }

  /// Replaces the subtree that ends with node `last` by a leaf of its bits.
  void replace_by_bits(int32_t last) {
    const int32_t first = rule_.nodes[last].first;
    const auto part = std::make_unique<Rule>();
    std::copy(std::begin(rule_.steps), std::end(rule_.steps), std::begin(part->steps));
    part->steps_size = rule_.steps_size;
    for (int32_t i = first; i <= last; ++i) {
      Rule::Node& node = part->nodes[part->size++];
      node = rule_.nodes[i];
      node.first -= first;
    }
    Rule::Node leaf{};
    leaf.kind = Rule::Kind::kPadding;
    leaf.first = first;
    leaf.conjunct = rule_.nodes[last].conjunct;
    leaf.padding = bits_of_part_ ? bits_of_part_(*part) : Padding{};
    result_.has_parts = true;
    rule_.nodes[first] = leaf;
    for (int32_t i = last + 1; i < rule_.size; ++i) {
      Rule::Node& node = rule_.nodes[i - (last - first)];
      node = rule_.nodes[i];
      node.first -= last - first;
    }
    rule_.size -= last - first;
    drop_unused_steps();
  }

  void drop_unused_steps() {
    int32_t moved_to[Rule::kMaxSteps + 1] = {};
    const auto is_used = [&](int32_t step) {
      return std::any_of(rule_.nodes, rule_.nodes + rule_.size, [&](const Rule::Node& node) {
        return node.step_begin <= step && step < node.step_end;
      });
    };
    int32_t used = 0;
    for (int32_t step = 0; step < rule_.steps_size; ++step) {
      moved_to[step] = used;
      if (is_used(step)) {
        rule_.steps[used++] = rule_.steps[step];
      }
    }
    rule_.steps_size = used;
    for (int32_t i = 0; i < rule_.size; ++i) {
      Rule::Node& node = rule_.nodes[i];
      const int32_t size = node.step_end - node.step_begin;
      node.step_begin = size == 0 ? 0 : moved_to[node.step_begin];
      node.step_end = node.step_begin + size;
    }
  }

  bool has_steps(int32_t first, int32_t last) const {
    return std::any_of(rule_.nodes + first, rule_.nodes + last + 1,
                       [](const Rule::Node& node) { return node.step_begin != node.step_end; });
  }

  /// Makes the largest complete subtree smaller: one of several nodes or, with `of_steps`, one that
  /// has any steps. False where there is none.
  bool make_room(bool of_steps = false) {
    int32_t largest = -1;
    int32_t most = of_steps ? 0 : 1;
    for (int32_t last = rule_.size - 1; last >= 0; last = rule_.nodes[last].first - 1) {
      const int32_t first = rule_.nodes[last].first;
      if (last - first + 1 > most && (!of_steps || has_steps(first, last))) {
        largest = last;
        most = last - first + 1;
      }
    }
    if (largest >= 0) {
      replace_by_bits(largest);
    }
    return largest >= 0;
  }

  Rule::Node& emit(Rule::Kind kind, bool conjunct) {
    if (rule_.size == Rule::kMaxNodes) {
      TORCH_INTERNAL_ASSERT(make_room());
    }
    Rule::Node& node = rule_.nodes[rule_.size];
    node = Rule::Node{};
    node.kind = kind;
    node.first = rule_.size++;
    node.conjunct = conjunct;
    return node;
  }

  /// Where the rule has these steps, or where they would go.
  Rule::Step* find_steps(const Rule::Step* steps, int32_t size) {
    return std::search(rule_.steps, rule_.steps + rule_.steps_size, steps, steps + size, same_step);
  }

  void place_steps(Rule::Node& node, const Rule::Step* steps, int32_t size) {
    Rule::Step* const place = find_steps(steps, size);
    if (place == rule_.steps + rule_.steps_size) {
      TORCH_INTERNAL_ASSERT(rule_.steps_size + size <= Rule::kMaxSteps);
      std::copy(steps, steps + size, place);
      rule_.steps_size += size;
    }
    node.step_begin = size == 0 ? 0 : static_cast<int32_t>(place - rule_.steps);
    node.step_end = node.step_begin + size;
  }

  Rule::Node& emit_leaf(Rule::Kind kind, bool conjunct) {
    const auto size = static_cast<int32_t>(chain_.size());
    TORCH_CHECK_NOT_IMPLEMENTED(size <= Rule::kMaxSteps, op_,
                                ": expected rule to change the positions of one leaf at most ",
                                int64_t{Rule::kMaxSteps}, " times, but it does so more often");
    while (rule_.steps_size + size > Rule::kMaxSteps &&
           find_steps(chain_.data(), size) == rule_.steps + rule_.steps_size &&
           make_room(/*of_steps=*/true)) {
    }
    Rule::Node& node = emit(kind, conjunct);
    place_steps(node, chain_.data(), size);
    return node;
  }

  void with_step(const Rule::Step& step, bool conjunct, int32_t depth) {
    chain_.push_back(step);
    subtree(conjunct, depth + 1);
    chain_.pop_back();
  }

  /// A shift on top of another is one shift.
  void with_shift(int64_t q_add, int64_t key_add, bool conjunct, int32_t depth) {
    if (chain_.empty() || chain_.back().table.exists()) {
      with_step({q_add, key_add, Table{}}, conjunct, depth);
      return;
    }
    const Rule::Step before = chain_.back();
    const Rule::Step sum{before.q_add + q_add, before.key_add + key_add, Table{}};
    for (const int64_t distance : {sum.q_add, sum.key_add}) {
      check_within_far(op_, distance, "the sum of the shifts of rule");
    }
    chain_.back() = sum;
    subtree(conjunct, depth + 1);
    chain_.back() = before;
  }

  void join(Rule::Kind kind, bool conjunct, int32_t depth) {
    const size_t at = next_;
    const int64_t n = number("how many rules follow");
    TORCH_CHECK_VALUE(n > 0 && n <= static_cast<int64_t>(program_.size()), op_,
                      ": expected how many rules follow at rule[", at,
                      "] to be positive and within the program, but got ", n);
    subtree(conjunct, depth + 1);
    for (int64_t i = 1; i < n; ++i) {
      subtree(conjunct, depth + 1);
      Rule::Node& node = emit(kind, conjunct);
      // It ends what the two subtrees before it are.
      const auto* const nodes = rule_.nodes;
      node.first = nodes[nodes[rule_.size - 2].first - 1].first;
    }
  }

  /// Where nothing but leaves waits, so that none can be made smaller, the subtree gets a rule of
  /// its own.
  void subtree_apart(bool conjunct, int32_t depth) {
    const auto waiting = std::make_unique<Rule>(rule_);
    rule_.size = 0;
    rule_.steps_size = 0;
    subtree(conjunct, depth);
    replace_by_bits(rule_.size - 1);
    Rule::Node leaf = rule_.nodes[0];
    rule_ = *waiting;
    leaf.first = rule_.size;
    rule_.nodes[rule_.size++] = leaf;
  }

  void subtree(bool conjunct, int32_t depth) {
    TORCH_CHECK_VALUE(depth <= kMaxDepth, op_, ": expected rule to be nested at most ",
                      int64_t{kMaxDepth}, " deep, but it is deeper");
    // Of the free nodes one may be taken by this subtree and one by the `and` or `or` after it.
    while (rule_.size > Rule::kMaxNodes - 3) {
      if (!make_room()) {
        subtree_apart(conjunct, depth);
        return;
      }
    }
    const size_t at = next_;
    const int64_t opcode = number("an opcode");
    switch (static_cast<Opcode>(opcode)) {
      case Opcode::kAll:
        emit_leaf(Rule::Kind::kAll, conjunct);
        return;
      case Opcode::kNothing:
        emit_leaf(Rule::Kind::kNothing, conjunct);
        return;
      case Opcode::kCausal:
        emit_leaf(Rule::Kind::kCausal, conjunct);
        return;
      case Opcode::kWindow: {
        const int64_t left = parameter("the left side of a window", 0);
        const int64_t right = parameter("the right side of a window", 0);
        TORCH_CHECK_VALUE(left >= kAbsent && right >= kAbsent, op_,
                          ": expected the sides of a window at rule[", at,
                          "] to be at least 0, or -1 for none, but got ", left, " and ", right);
        emit_leaf(Rule::Kind::kSlidingWindow, conjunct).sliding_window = {
            left < 0 ? kOpen : std::min(left, kOpen), right < 0 ? kOpen : std::min(right, kOpen)};
        return;
      }
      case Opcode::kChunk: {
        const int64_t size = parameter("the size of a chunk", 1);
        TORCH_CHECK_VALUE(size > 0, op_, ": expected the size of a chunk at rule[", at,
                          "] to be positive, but got ", size);
        const int64_t kept = std::min(size, kOpen);
        Chunk chunk{kept, Divisor(kept), {}, 0};
        if (program_.size() > next_ && program_[next_].maybe_as_int() == kAbsent) {
          ++next_;
        } else {
          const at::Tensor& before = operand("the padding before chunks");
          check_rank(op_, "the padding before chunks", before, 1, "[batch_size]");
          const Table padding = table("the padding before chunks", before.unsqueeze(1));
          chunk.padding = padding.numbers;
          chunk.batch_stride = padding.batch_stride;
        }
        emit_leaf(Rule::Kind::kChunk, conjunct).chunk = chunk;
        return;
      }
      case Opcode::kBlocks: {
        const Table ids = table("the ids of blocks", operand("the ids of blocks"));
        emit_leaf(Rule::Kind::kSameId, conjunct).same_id = {ids, /*negative_is_none=*/true};
        return;
      }
      case Opcode::kDocuments: {
        const Table ids = table("the ids of documents", operand("the ids of documents"));
        emit_leaf(Rule::Kind::kSameId, conjunct).same_id = {ids, /*negative_is_none=*/false};
        return;
      }
      case Opcode::kPadding: {
        const Padding leaf = padding(operand("a padding operand"));
        emit_leaf(Rule::Kind::kPadding, conjunct).padding = leaf;
        return;
      }
      case Opcode::kBits: {
        const Padding leaf = bits(operand("a bits operand"));
        emit_leaf(Rule::Kind::kPadding, conjunct).padding = leaf;
        return;
      }
      case Opcode::kAnd:
        join(Rule::Kind::kAnd, conjunct, depth);
        return;
      case Opcode::kOr:
        join(Rule::Kind::kOr, /*conjunct=*/false, depth);
        return;
      case Opcode::kReindex: {
        const Table positions = table("positions", operand("positions"));
        with_step({0, 0, positions}, conjunct, depth);
        return;
      }
      case Opcode::kShift: {
        const int64_t q_add = distance("what is added to queries' positions");
        const int64_t key_add = distance("what is added to keys' positions");
        with_shift(q_add, key_add, conjunct, depth);
        return;
      }
    }
    TORCH_CHECK_VALUE(false, op_, ": expected an opcode from 0 to ", std::size(kOpcodeNames) - 1,
                      " at rule[", at, "], but got ", opcode);
  }

  static constexpr int64_t kNowhere = 0;

  const char* op_;
  c10::SymIntArrayRef program_;
  at::TensorList operands_;
  const c10::SymInt& batch_size_;
  const c10::SymInt& q_length_;
  const c10::SymInt& kv_length_;
  at::Device device_;
  bool with_data_;
  int64_t first_row_;
  const BitsOfPart& bits_of_part_;
  size_t next_ = 0;
  Rule& rule_;
  Decoded& result_;
  std::vector<Rule::Step> chain_;  // the position changes above the rule that is being read
};

}  // namespace

Padding bits_leaf(const at::Tensor& bits, int64_t first_row) {
  return {static_cast<const bool*>(bits.const_data_ptr()) + first_row * bits.stride(2),
          bits.size(0) == 1 ? 0 : bits.stride(0),
          bits.size(1) == 1 ? 0 : bits.stride(1),
          bits.stride(2),
          bits.stride(3),
          bits.size(3),
          /*element_size=*/1,
          /*by_column=*/true,
          is_nonzero(at::kBool)};
}

Decoded decode_rule(const char* op, const RuleProgram& program, at::Device device, bool with_data,
                    Rule& rule, int64_t first_row, const BitsOfPart& bits_of_part) {
  Decoded result{};
  Decoder(op, program, device, with_data, first_row, bits_of_part, rule, result).decode();
  return result;
}

}  // namespace attn_mask
