#include "ops/core/rule_program.h"

#include <algorithm>
#include <iterator>
#include <memory>
#include <vector>

#include "ops/core/checks.h"
#include "ops/core/program_reader.h"

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
class Decoder : ProgramReader {
 public:
  Decoder(const char* op, const RuleProgram& program, at::Device device, bool with_data,
          int64_t first_row, const BitsOfPart& bits_of_part, Rule& rule, Decoded& result)
      : ProgramReader(op, program, device, with_data, first_row),
        bits_of_part_(bits_of_part),
        rule_(rule),
        result_(result) {
    rule_.size = 0;
    rule_.steps_size = 0;
  }

  void decode() {
    subtree(/*conjunct=*/true, 0);
    check_end();
    result_.depends_on_batch = depends_on_batch_;
    result_.heads = heads_;
  }

 private:
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

  void window(bool conjunct, size_t at) {
    const int64_t left = parameter("the left side of a window", 0);
    const int64_t right = parameter("the right side of a window", 0);
    TORCH_CHECK_VALUE(left >= kAbsent && right >= kAbsent, op_,
                      ": expected the sides of a window at rule[", at,
                      "] to be at least 0, or -1 for none, but got ", left, " and ", right);
    emit_leaf(Rule::Kind::kSlidingWindow, conjunct).sliding_window = {
        left < 0 ? kOpen : std::min(left, kOpen), right < 0 ? kOpen : std::min(right, kOpen)};
  }

  void chunk(bool conjunct, size_t at) {
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
      case Opcode::kWindow:
        window(conjunct, at);
        return;
      case Opcode::kChunk:
        chunk(conjunct, at);
        return;
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

  const BitsOfPart& bits_of_part_;
  Rule& rule_;
  Decoded& result_;
  std::vector<Rule::Step> chain_;  // the position changes above the rule that is being read
};

}  // namespace

Decoded decode_rule(const char* op, const RuleProgram& program, at::Device device, bool with_data,
                    Rule& rule, int64_t first_row, const BitsOfPart& bits_of_part) {
  Decoded result{};
  Decoder(op, program, device, with_data, first_row, bits_of_part, rule, result).decode();
  return result;
}

}  // namespace attn_mask
