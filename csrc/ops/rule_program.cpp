#include "ops/rule_program.h"

#include <algorithm>
#include <vector>

#include "ops/checks.h"
#include "ops/dtypes.h"

namespace attn_mask {
namespace {

constexpr int32_t kMaxDepth = 64;

class Decoder {
 public:
  Decoder(const char* op, c10::SymIntArrayRef program, at::TensorList operands,
          const c10::SymInt& batch_size, const c10::SymInt& q_length, const c10::SymInt& kv_length,
          at::Device device, bool with_data)
      : op_(op),
        program_(program),
        operands_(operands),
        batch_size_(batch_size),
        q_length_(q_length),
        kv_length_(kv_length),
        device_(device),
        with_data_(with_data) {
    result_.heads = 1;
  }

  DecodedRule decode() {
    subtree(/*conjunct=*/true, 0);
    TORCH_CHECK_VALUE(next_ == program_.size(), op_, ": expected rule to end after ", next_,
                      " numbers, but got ", program_.size());
    return result_;
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
    TORCH_CHECK_VALUE(-kFar < value && value < kFar, op_, ": expected ", what, " at rule[", at,
                      "] to be within 2^60 of 0, but got ", value);
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
      // A table without rows is never asked; one without columns holds no position.
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
      result = {
          tensor.const_data_ptr(), batch_stride(tensor), tensor.size(1) == 1 ? 0 : tensor.stride(1),
          tensor.stride(2),        tensor.stride(3),     tensor.size(3),
          /*element_size=*/1,
          /*by_column=*/true,      is_nonzero(at::kBool)};
    }
    return result;
  }

  Rule::Node& emit(Rule::Kind kind, bool conjunct) {
    Rule& rule = result_.rule;
    TORCH_CHECK_NOT_IMPLEMENTED(rule.size < Rule::kMaxNodes, op_,
                                ": expected rule to have at most ", int64_t{Rule::kMaxNodes},
                                " parts, but it has more");
    Rule::Node& node = rule.nodes[rule.size];
    node.kind = kind;
    node.first = rule.size++;
    node.conjunct = conjunct;
    node.step_begin = 0;
    node.step_end = 0;
    return node;
  }

  Rule::Node& emit_leaf(Rule::Kind kind, bool conjunct) {
    Rule::Node& node = emit(kind, conjunct);
    Rule& rule = result_.rule;
    if (!chain_emitted_) {
      TORCH_CHECK_NOT_IMPLEMENTED(
          rule.steps_size + static_cast<int32_t>(chain_.size()) <= Rule::kMaxSteps, op_,
          ": expected rule to change positions at most ", int64_t{Rule::kMaxSteps},
          " times, but it does so more often");
      chain_begin_ = rule.steps_size;
      for (const Rule::Step& step : chain_) {
        rule.steps[rule.steps_size++] = step;
      }
      chain_emitted_ = true;
    }
    node.step_begin = chain_begin_;
    node.step_end = chain_begin_ + static_cast<int32_t>(chain_.size());
    return node;
  }

  void with_step(const Rule::Step& step, bool conjunct, int32_t depth) {
    chain_.push_back(step);
    chain_emitted_ = false;
    subtree(conjunct, depth + 1);
    chain_.pop_back();
    chain_emitted_ = false;
  }

  void join(Rule::Kind kind, bool conjunct, int32_t depth) {
    const size_t at = next_;
    const int64_t n = number("how many rules follow");
    TORCH_CHECK_VALUE(n > 0 && n <= static_cast<int64_t>(program_.size()), op_,
                      ": expected how many rules follow at rule[", at,
                      "] to be positive and within the program, but got ", n);
    const int32_t first = result_.rule.size;
    subtree(conjunct, depth + 1);
    for (int64_t i = 1; i < n; ++i) {
      subtree(conjunct, depth + 1);
      emit(kind, conjunct).first = first;
    }
  }

  void subtree(bool conjunct, int32_t depth) {
    TORCH_CHECK_VALUE(depth <= kMaxDepth, op_, ": expected rule to be nested at most ",
                      int64_t{kMaxDepth}, " deep, but it is deeper");
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
        TORCH_CHECK_VALUE(left >= -1 && right >= -1, op_,
                          ": expected the sides of a window at rule[", at,
                          "] to be at least 0, or -1 for none, but got ", left, " and ", right);
        emit_leaf(Rule::Kind::kSlidingWindow, conjunct).sliding_window = {
            left < 0 ? kFar : std::min(left, kFar), right < 0 ? kFar : std::min(right, kFar)};
        return;
      }
      case Opcode::kChunk: {
        const int64_t size = parameter("the size of a chunk", 1);
        TORCH_CHECK_VALUE(size > 0, op_, ": expected the size of a chunk at rule[", at,
                          "] to be positive, but got ", size);
        Chunk chunk{std::min(size, kFar), Table{}};
        if (program_.size() > next_ && program_[next_].maybe_as_int() == -1) {
          ++next_;
        } else {
          const at::Tensor& before = operand("the padding before chunks");
          check_rank(op_, "the padding before chunks", before, 1, "[batch_size]");
          chunk.padding = table("the padding before chunks", before.unsqueeze(1));
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
        with_step({q_add, key_add, Table{}}, conjunct, depth);
        return;
      }
    }
    TORCH_CHECK_VALUE(false, op_, ": expected an opcode from 0 to ",
                      static_cast<int64_t>(Opcode::kNothing), " at rule[", at, "], but got ",
                      opcode);
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
  size_t next_ = 0;
  DecodedRule result_{};
  // The position changes around the rule that is being read, and where they lie among the rule's
  // steps once a leaf has needed them.
  std::vector<Rule::Step> chain_;
  bool chain_emitted_ = false;
  int32_t chain_begin_ = 0;
};

}  // namespace

DecodedRule decode_rule(const char* op, c10::SymIntArrayRef program, at::TensorList operands,
                        const c10::SymInt& batch_size, const c10::SymInt& q_length,
                        const c10::SymInt& kv_length, at::Device device, bool with_data) {
  return Decoder(op, program, operands, batch_size, q_length, kv_length, device, with_data)
      .decode();
}

}  // namespace attn_mask
