#pragma once

// Random samples for the fuzzer: programs of rules (see rule/program.h) over tensors in memory
// of exactly their size, so that AddressSanitizer sees each read beside them; and what each
// program gives for each element, worked out from the program alone, not from anything that the
// library makes of it.

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <optional>
#include <random>
#include <stdexcept>
#include <vector>

#include "ops/core/rule_program.h"

namespace attn_mask::fuzz {

/// Random numbers, the same for a seed on every machine.
struct Random {
  explicit Random(uint64_t seed)
      : generator(static_cast<uint32_t>(seed ^ seed >> 32) * 2654435761U + 1) {}

  std::mt19937 generator;

  uint64_t bits() { return uint64_t{generator()} << 32 | generator(); }
  /// `first <= number <= last`.
  int64_t between(int64_t first, int64_t last) {
    return first + static_cast<int64_t>(bits() % static_cast<uint64_t>(last - first + 1));
  }
  bool one_in(int64_t n) { return between(1, n) == 1; }
  template <typename T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[between(0, static_cast<int64_t>(choices.size()) - 1)];
  }
};

constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
constexpr int64_t kLeast = std::numeric_limits<int64_t>::min();

/// A tensor over memory that ends with its last element.
inline at::Tensor exact_tensor(const std::vector<int64_t>& sizes,
                               const std::vector<int64_t>& strides, at::ScalarType dtype) {
  int64_t elements = 1;
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    elements = sizes[dim] == 0 || elements == 0 ? 0 : elements + (sizes[dim] - 1) * strides[dim];
  }
  void* const memory = std::malloc(static_cast<size_t>(elements) * c10::elementSize(dtype));
  return at::from_blob(
      memory, sizes, strides, [](void* data) { std::free(data); }, at::TensorOptions(dtype));
}

/// Strides in any order of the dimensions, with gaps; with `repeats` now and then 0.
inline std::vector<int64_t> random_strides(Random& random, const std::vector<int64_t>& sizes,
                                           bool repeats) {
  std::vector<size_t> order(sizes.size());
  std::iota(order.rbegin(), order.rend(), size_t{0});
  if (random.one_in(3)) {
    std::shuffle(order.begin(), order.end(), random.generator);
  }
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = random.one_in(4) ? 2 : 1;
  for (const size_t dim : order) {
    strides[dim] = repeats && random.one_in(8) ? 0 : stride;
    stride *= std::max<int64_t>(sizes[dim], 1);
    stride += random.one_in(4) ? random.between(1, 4) : 0;
  }
  return strides;
}

inline at::Tensor random_layout(Random& random, const std::vector<int64_t>& sizes,
                                at::ScalarType dtype, bool repeats = true) {
  return exact_tensor(sizes, random_strides(random, sizes, repeats), dtype);
}

inline int64_t offset_of(const at::Tensor& tensor, const std::vector<int64_t>& index) {
  int64_t offset = 0;
  for (size_t dim = 0; dim < index.size(); ++dim) {
    offset += index[dim] * tensor.stride(static_cast<int64_t>(dim));
  }
  return offset * tensor.element_size();
}

inline void put(const at::Tensor& tensor, const std::vector<int64_t>& index, uint64_t bits) {
  std::memcpy(static_cast<char*>(tensor.data_ptr()) + offset_of(tensor, index), &bits,
              static_cast<size_t>(tensor.element_size()));
}

inline uint64_t get(const at::Tensor& tensor, const std::vector<int64_t>& index) {
  uint64_t bits = 0;
  std::memcpy(&bits, static_cast<const char*>(tensor.data_ptr()) + offset_of(tensor, index),
              static_cast<size_t>(tensor.element_size()));
  return bits;
}

/// An element of an integer dtype.
inline int64_t integer(const at::Tensor& tensor, const std::vector<int64_t>& index) {
  const auto bits = static_cast<int64_t>(get(tensor, index));
  const int64_t unused = 64 - 8 * tensor.element_size();
  return tensor.scalar_type() == at::kByte
             ? bits
             : static_cast<int64_t>(static_cast<uint64_t>(bits) << unused) >> unused;
}

/// A sample as operators are given it.
struct Sample {
  std::vector<int64_t> code;
  std::vector<at::Tensor> operands;
  int64_t batch_size;
  int64_t heads;  // those that bits have
  int64_t q_length;
  int64_t kv_length;
  int64_t q_offset;
  int64_t kv_offset;
  std::optional<at::Tensor> q_positions;
  std::optional<at::Tensor> kv_positions;

  int64_t elements() const { return batch_size * heads * q_length * kv_length; }
};

/// The program of a sample is not one, or its operands are not what it needs.
struct Invalid : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A program, read.
struct Tree {
  Opcode opcode;
  int64_t a = 0;
  int64_t b = 0;
  std::vector<Tree> children;
};

inline Tree parse(const Sample& sample, size_t& at) {
  const auto take = [&] {
    if (at >= sample.code.size()) {
      throw Invalid("it ends too early");
    }
    return sample.code[at++];
  };
  const auto expect = [](bool condition, const char* text) {
    if (!condition) {
      throw Invalid(text);
    }
  };
  const auto operand = [&](int64_t index, int64_t rank) -> const at::Tensor& {
    expect(0 <= index && index < static_cast<int64_t>(sample.operands.size()), "no such operand");
    const at::Tensor& tensor = sample.operands[static_cast<size_t>(index)];
    expect(tensor.dim() == rank, "an operand's rank");
    expect(tensor.size(0) == 1 || tensor.size(0) == sample.batch_size, "an operand's batch");
    return tensor;
  };
  const auto integers = [&](int64_t index, int64_t rank) {
    const at::ScalarType dtype = operand(index, rank).scalar_type();
    expect(at::isIntegralType(dtype, /*includeBool=*/false), "an operand's dtype");
  };
  Tree tree{static_cast<Opcode>(take()), 0, 0, {}};
  int64_t children = 0;
  switch (tree.opcode) {
    case Opcode::kAll:
    case Opcode::kNothing:
    case Opcode::kCausal:
      break;
    case Opcode::kWindow:
      tree.a = take();
      tree.b = take();
      expect(tree.a >= -1 && tree.b >= -1, "a window's sides");
      break;
    case Opcode::kChunk:
      tree.a = take();
      tree.b = take();
      expect(tree.a > 0, "a chunk's size");
      if (tree.b != -1) {
        integers(tree.b, 1);
      }
      break;
    case Opcode::kBlocks:
    case Opcode::kDocuments:
      tree.a = take();
      integers(tree.a, 2);
      break;
    case Opcode::kPadding:
      tree.a = take();
      operand(tree.a, 2);
      break;
    case Opcode::kBits: {
      tree.a = take();
      const at::Tensor& bits = operand(tree.a, 4);
      expect(bits.scalar_type() == at::kBool && bits.size(2) == sample.q_length &&
                 bits.size(3) == sample.kv_length,
             "bits");
      break;
    }
    case Opcode::kAnd:
    case Opcode::kOr:
      children = take();
      expect(children > 0, "how many rules follow");
      break;
    case Opcode::kReindex:
      tree.a = take();
      integers(tree.a, 2);
      children = 1;
      break;
    case Opcode::kShift:
      tree.a = take();
      tree.b = take();
      children = 1;
      break;
    default:
      throw Invalid("no such opcode");
  }
  for (int64_t i = 0; i < children; ++i) {
    tree.children.push_back(parse(sample, at));
  }
  return tree;
}

inline Tree parse(const Sample& sample) {
  size_t at = 0;
  Tree tree = parse(sample, at);
  if (at != sample.code.size()) {
    throw Invalid("it goes on");
  }
  return tree;
}

/// What is read as a position counts as within 2^59 of 0.
inline int64_t as_position(int64_t value) {
  constexpr int64_t kLimit = int64_t{1} << 59;
  return std::clamp(value, -kLimit, kLimit);
}

/// An element of a sample: the row and the column, and where they stand.
struct Element {
  int64_t batch;
  int64_t head;
  int64_t row;
  int64_t column;
  int64_t q;
  int64_t k;
};

inline bool attends(const Sample& sample, const Tree& tree, const Element& element) {
  const auto tensor = [&](int64_t index) -> const at::Tensor& {
    return sample.operands[static_cast<size_t>(index)];
  };
  const auto row_of = [&](const at::Tensor& table) {
    return table.size(0) == 1 ? int64_t{0} : element.batch;
  };
  const auto holds = [](const at::Tensor& table, int64_t position) {
    return 0 <= position && position < table.size(1);
  };
  const int64_t q = element.q;
  const int64_t k = element.k;
  switch (tree.opcode) {
    case Opcode::kAll:
      return true;
    case Opcode::kNothing:
      return false;
    case Opcode::kCausal:
      return k <= q;
    case Opcode::kWindow:
      return (tree.a == -1 || q - k <= tree.a) && (tree.b == -1 || k - q <= tree.b);
    case Opcode::kChunk: {
      int64_t first = 0;
      if (tree.b != -1) {
        const at::Tensor& before = tensor(tree.b);
        first = as_position(integer(before, {row_of(before)}));
      }
      const auto chunk = [&](int64_t position) {
        const int64_t distance = position - first;
        return distance / tree.a - (distance % tree.a < 0 ? 1 : 0);
      };
      return chunk(q) == chunk(k);
    }
    case Opcode::kBlocks:
    case Opcode::kDocuments: {
      const at::Tensor& ids = tensor(tree.a);
      if (!holds(ids, q) || !holds(ids, k)) {
        return false;
      }
      const int64_t id = integer(ids, {row_of(ids), q});
      return id == integer(ids, {row_of(ids), k}) && (tree.opcode == Opcode::kDocuments || id >= 0);
    }
    case Opcode::kPadding: {
      const at::Tensor& mask = tensor(tree.a);
      if (!holds(mask, k)) {
        return false;
      }
      const uint64_t bits = get(mask, {row_of(mask), k});
      switch (mask.scalar_type()) {
        case at::kHalf:
        case at::kBFloat16:
          return (bits & 0x7FFF) != 0;
        case at::kFloat:
          return (bits & 0x7FFFFFFF) != 0;
        case at::kDouble:
          return (bits & 0x7FFFFFFFFFFFFFFF) != 0;
        case at::kFloat8_e4m3fn:
        case at::kFloat8_e5m2:
          return (bits & 0x7F) != 0;
        case at::kFloat8_e8m0fnu:
          return true;
        default:
          return bits != 0;
      }
    }
    case Opcode::kBits: {
      const at::Tensor& bits = tensor(tree.a);
      const int64_t head = bits.size(1) == 1 ? 0 : element.head;
      return get(bits, {row_of(bits), head, element.row, element.column}) != 0;
    }
    case Opcode::kAnd:
      return std::all_of(tree.children.begin(), tree.children.end(),
                         [&](const Tree& child) { return attends(sample, child, element); });
    case Opcode::kOr:
      return std::any_of(tree.children.begin(), tree.children.end(),
                         [&](const Tree& child) { return attends(sample, child, element); });
    case Opcode::kReindex: {
      const at::Tensor& positions = tensor(tree.a);
      if (!holds(positions, q) || !holds(positions, k)) {
        return false;
      }
      Element moved = element;
      moved.q = as_position(integer(positions, {row_of(positions), q}));
      moved.k = as_position(integer(positions, {row_of(positions), k}));
      return attends(sample, tree.children[0], moved);
    }
    case Opcode::kShift: {
      Element moved = element;
      moved.q += tree.a;
      moved.k += tree.b;
      return attends(sample, tree.children[0], moved);
    }
  }
  return false;
}

inline int64_t position(const std::optional<at::Tensor>& positions, int64_t offset, int64_t batch,
                        int64_t index) {
  if (!positions) {
    return offset + index;
  }
  if (positions->dim() == 0) {
    return offset + as_position(integer(*positions, {})) + index;
  }
  if (positions->dim() == 1) {
    return offset + as_position(integer(*positions, {index}));
  }
  const int64_t row = positions->size(0) == 1 ? 0 : batch;
  return positions->size(1) == 1 ? offset + as_position(integer(*positions, {row, 0})) + index
                                 : offset + as_position(integer(*positions, {row, index}));
}

/// The mask, [batch_size, heads, q_length, kv_length], a byte for each element.
inline std::vector<uint8_t> mask_of(const Sample& sample) {
  const Tree tree = parse(sample);
  std::vector<uint8_t> mask;
  mask.reserve(static_cast<size_t>(sample.elements()));
  for (int64_t batch = 0; batch < sample.batch_size; ++batch) {
    for (int64_t head = 0; head < sample.heads; ++head) {
      for (int64_t row = 0; row < sample.q_length; ++row) {
        const int64_t q = position(sample.q_positions, sample.q_offset, batch, row);
        for (int64_t column = 0; column < sample.kv_length; ++column) {
          const int64_t k = position(sample.kv_positions, sample.kv_offset, batch, column);
          mask.push_back(attends(sample, tree, {batch, head, row, column, q, k}) ? 1 : 0);
        }
      }
    }
  }
  return mask;
}

/// Draws samples.
class Drawer {
 public:
  explicit Drawer(Random& random) : random_(random) {}

  Sample sample() {
    sample_.batch_size = random_.pick<int64_t>({0, 1, 1, 1, 2, 2, 3});
    draw_lengths();
    bits_heads_ = random_.one_in(4) ? random_.pick<int64_t>({0, 2, 3}) : 1;
    // Where positions are far from 0 all are, so that rows are not all alike.
    base_ =
        random_.one_in(8) ? random_.pick<int64_t>({kFar - 400, -kFar + 400, 1LL << 40, 3000}) : 0;
    const bool far = base_ != 0;
    sample_.q_offset = base_ + near_zero();
    sample_.kv_offset = (far && random_.one_in(3) ? 0 : base_) + near_zero();
    sample_.q_positions = positions(sample_.q_length);
    sample_.kv_positions = positions(sample_.kv_length);
    const int64_t reach = std::max(sample_.q_length, sample_.kv_length) + 24;
    table_length_ = random_.pick<int64_t>({reach, reach, reach, sample_.kv_length,
                                           sample_.kv_length / 2, random_.between(0, 60), 1, 0});
    // More leaves than kernels take, now and then.
    const int64_t leaves = random_.one_in(12) ? random_.between(13, 40) : random_.between(1, 9);
    sample_.heads = 1;
    tree(leaves, 0, 0);
    return std::move(sample_);
  }

  /// Garbage that begins as a program may.
  void garbage(std::vector<int64_t>& code) {
    for (int64_t n = random_.between(0, 30); n > 0; --n) {
      code.push_back(number());
    }
  }

  /// Changes the program, or an operand, of a sample.
  void mutate(Sample& sample) {
    std::vector<int64_t>& code = sample.code;
    for (int64_t n = random_.between(1, 3); n > 0; --n) {
      const auto at = static_cast<ptrdiff_t>(
          random_.between(0, std::max<int64_t>(0, static_cast<int64_t>(code.size()) - 1)));
      switch (random_.between(0, 6)) {
        case 0:
          code.insert(code.begin() + std::min<ptrdiff_t>(at, std::ssize(code)), number());
          break;
        case 1:
          code.resize(static_cast<size_t>(at));
          break;
        case 2:
          if (!code.empty()) {
            code.erase(code.begin() + at);
          }
          break;
        case 3:
          garbage(code);
          break;
        case 4:
          if (!sample.operands.empty()) {
            at::Tensor& operand = sample.operands[static_cast<size_t>(
                random_.between(0, std::ssize(sample.operands) - 1))];
            operand = any_tensor();
          }
          break;
        default:
          if (!code.empty()) {
            code[static_cast<size_t>(at)] = number();
          }
          break;
      }
    }
  }

 private:
  static constexpr int64_t kFar = (int64_t{1} << 59) - 1;

  int64_t near_zero() { return random_.one_in(2) ? 0 : random_.between(-8, 40); }

  int64_t number() {
    return random_.one_in(6)
               ? random_.pick<int64_t>({kMost, kLeast, kFar, -kFar, kFar + 1, -kFar - 1, 1LL << 62,
                                        1LL << 31, -(1LL << 62), 255, 256})
               : random_.between(-2, 14);
  }

  void draw_lengths() {
    const auto length = [&] {
      return random_.one_in(12) ? 0 : random_.between(1, random_.pick<int64_t>({4, 20, 70, 300}));
    };
    sample_.q_length = length();
    sample_.kv_length = length();
    if (random_.one_in(40)) {  // longer than what is evaluated at once
      sample_.kv_length = random_.between(4000, 9000);
      sample_.q_length = random_.between(1, 2);
      sample_.batch_size = 1;
    }
    while (sample_.batch_size * sample_.q_length * sample_.kv_length > 20000) {
      sample_.q_length = sample_.q_length / 2 + 1;
    }
  }

  at::ScalarType integer_dtype() {
    return random_.pick({at::kLong, at::kLong, at::kInt, at::kShort, at::kChar, at::kByte});
  }

  int64_t rows() { return random_.one_in(3) ? 1 : sample_.batch_size; }

  at::Tensor any_tensor() {
    std::vector<int64_t> sizes;
    for (int64_t rank = random_.between(0, 5); rank > 0; --rank) {
      sizes.push_back(random_.pick<int64_t>(
          {0, 1, 2, sample_.batch_size, sample_.q_length, sample_.kv_length}));
    }
    if (std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>()) > 1 << 20) {
      sizes.clear();
    }
    const at::ScalarType dtype =
        random_.pick({at::kLong, at::kInt, at::kBool, at::kFloat, at::kHalf, at::kComplexFloat,
                      at::kFloat8_e4m3fn, at::kUInt16, at::kByte});
    at::Tensor tensor =
        exact_tensor(sizes, random_strides(random_, sizes, /*repeats=*/true), dtype);
    if (tensor.numel() != 0) {
      std::memset(tensor.data_ptr(), random_.one_in(2) ? 0 : 1, tensor.storage().nbytes());
    }
    return tensor;
  }

  /// The operand's index.
  int64_t add(at::Tensor tensor) {
    sample_.operands.push_back(std::move(tensor));
    return std::ssize(sample_.operands) - 1;
  }

  /// [rows, length], each row by one of the kinds of `value(kind, i, before)`.
  template <typename Value>
  at::Tensor table(int64_t length, int64_t kinds, Value value) {
    const int64_t n = rows();
    const at::Tensor tensor = random_layout(random_, {n, length}, integer_dtype());
    for (int64_t row = 0; row < n; ++row) {
      const int64_t kind = random_.between(0, kinds - 1);
      int64_t before = random_.between(-2, 3);
      for (int64_t i = 0; i < length; ++i) {
        before = value(kind, i, before);
        put(tensor, {row, i}, static_cast<uint64_t>(before));
      }
    }
    return tensor;
  }

  at::Tensor ids() {
    return table(table_length_, 6, [&](int64_t kind, int64_t i, int64_t before) {
      switch (kind) {
        case 0:
          return random_.between(-2, 3);
        case 1:  // documents, one after the other
          return before + (random_.one_in(9) ? 1 : 0);
        case 2:  // runs of a few
          return random_.one_in(6) ? random_.between(-1, 2) : before;
        case 3:
          return before;
        case 4:
          return i;
        default:
          return random_.one_in(5) ? random_.pick<int64_t>({kMost, kLeast, kLeast + 1, -1, 0})
                                   : before;
      }
    });
  }

  at::Tensor other_positions() {
    const bool far = base_ != 0 && random_.one_in(2);
    return table(table_length_, 5, [&](int64_t kind, int64_t i, int64_t before) -> int64_t {
      switch (kind) {
        case 0:  // every document counts from zero
          return random_.one_in(9) ? 0 : static_cast<int64_t>(static_cast<uint64_t>(before) + 1);
        case 1:
          return i + (far ? base_ : random_.between(-2, 2));
        case 2:
          return random_.between(-3, table_length_);
        case 3:
          return table_length_ - i;
        default:
          return random_.one_in(5) ? random_.pick<int64_t>({kMost, kLeast, kFar, kFar + 1, -kFar})
                                   : static_cast<int64_t>(static_cast<uint64_t>(before) + 1);
      }
    });
  }

  at::Tensor padding() {
    const at::ScalarType dtype = random_.pick(
        {at::kBool, at::kBool, at::kLong, at::kInt, at::kShort, at::kChar, at::kByte, at::kHalf,
         at::kBFloat16, at::kFloat, at::kDouble, at::kFloat8_e4m3fn, at::kFloat8_e5m2,
         at::kFloat8_e4m3fnuz, at::kFloat8_e5m2fnuz, at::kFloat8_e8m0fnu});
    const int64_t n = rows();
    const at::Tensor tensor = random_layout(random_, {n, table_length_}, dtype);
    const uint64_t sign = uint64_t{1} << (8 * tensor.element_size() - 1);
    for (int64_t row = 0; row < n; ++row) {
      const int64_t kind = random_.between(0, 3);
      const int64_t split = random_.between(0, table_length_);
      for (int64_t i = 0; i < table_length_; ++i) {
        const bool set = kind == 0 ? i < split : kind == 1 ? i >= split : random_.one_in(2);
        const uint64_t other =
            dtype == at::kBool ? 1 : random_.pick({random_.bits(), sign, sign + 1});
        put(tensor, {row, i}, kind == 3 ? (set ? other : 0) : set ? 1 : 0);
      }
    }
    return tensor;
  }

  at::Tensor bits() {
    const int64_t heads = random_.one_in(2) ? 1 : bits_heads_;
    sample_.heads = heads == 1 ? sample_.heads : heads;
    const std::vector<int64_t> sizes{rows(), heads, sample_.q_length, sample_.kv_length};
    const at::Tensor tensor = random_layout(random_, sizes, at::kBool);
    const int64_t density = random_.between(2, 5);
    for (int64_t i = 0; i < tensor.numel(); ++i) {
      put(tensor,
          {i / (sizes[1] * sizes[2] * sizes[3]), i / (sizes[2] * sizes[3]) % sizes[1],
           i / sizes[3] % sizes[2], i % sizes[3]},
          random_.one_in(density) ? 0 : 1);
    }
    return tensor;
  }

  std::optional<at::Tensor> positions(int64_t length) {
    if (!random_.one_in(3)) {
      return std::nullopt;
    }
    const int64_t kind = random_.between(0, 4);
    const at::ScalarType dtype = integer_dtype();
    if (kind == 0) {
      const at::Tensor tensor = exact_tensor({}, {}, dtype);
      put(tensor, {}, static_cast<uint64_t>(near_zero()));
      return tensor;
    }
    const int64_t n = rows();
    const std::vector<int64_t> sizes = kind == 1   ? std::vector<int64_t>{n, 1}
                                       : kind == 2 ? std::vector<int64_t>{length}
                                                   : std::vector<int64_t>{n, length};
    const at::Tensor tensor = random_layout(random_, sizes, dtype);
    const int64_t values = random_.between(0, 3);
    int64_t value = near_zero();
    for (int64_t i = 0; i < tensor.numel(); ++i) {
      value = values == 0   ? random_.between(-5, length + 5)
              : values == 1 ? value + 1
              : values == 2 ? (random_.one_in(7) ? random_.between(0, 50) : value + 1)
                            : random_.pick<int64_t>({kMost, kLeast, 0, 1, 2, kFar, -kFar});
      value = std::min(value, kMost - 1);
      put(tensor,
          sizes.size() == 1 ? std::vector<int64_t>{i}
                            : std::vector<int64_t>{i / sizes[1], i % sizes[1]},
          static_cast<uint64_t>(value));
    }
    return tensor;
  }

  int64_t side() {
    return random_.one_in(6) ? random_.pick<int64_t>({-1, kMost, 1LL << 62, kFar})
                             : random_.between(0, random_.pick<int64_t>({2, 10, 100}));
  }

  void leaf() {
    std::vector<int64_t>& code = sample_.code;
    switch (random_.between(0, 11)) {
      case 0:
        code.push_back(static_cast<int64_t>(random_.pick({Opcode::kAll, Opcode::kNothing})));
        return;
      case 1:
      case 2:
        code.push_back(static_cast<int64_t>(Opcode::kCausal));
        return;
      case 3:
      case 4:
        code.insert(code.end(), {static_cast<int64_t>(Opcode::kWindow), side(), side()});
        return;
      case 5: {
        code.insert(code.end(),
                    {static_cast<int64_t>(Opcode::kChunk), std::max<int64_t>(side(), 1)});
        int64_t before = -1;
        if (random_.one_in(2)) {
          const at::Tensor tensor = random_layout(random_, {rows()}, integer_dtype());
          for (int64_t row = 0; row < tensor.size(0); ++row) {
            const int64_t value = random_.one_in(8) ? random_.pick<int64_t>({kMost, kLeast, base_})
                                                    : random_.between(-9, 40);
            put(tensor, {row}, static_cast<uint64_t>(value));
          }
          before = add(tensor);
        }
        code.push_back(before);
        return;
      }
      case 6:
        code.insert(code.end(), {static_cast<int64_t>(Opcode::kBlocks), add(ids())});
        return;
      case 7:
      case 8:
        code.insert(code.end(), {static_cast<int64_t>(Opcode::kDocuments), add(ids())});
        return;
      case 9:
      case 10:
        code.insert(code.end(), {static_cast<int64_t>(Opcode::kPadding), add(padding())});
        return;
      default:
        code.insert(code.end(), {static_cast<int64_t>(Opcode::kBits), add(bits())});
        return;
    }
  }

  /// A tree of so many leaves; `steps` and `shifted` are what changes positions above it.
  void tree(int64_t leaves, int64_t steps, int64_t shifted) {
    std::vector<int64_t>& code = sample_.code;
    if (steps < 6 && random_.one_in(6)) {
      code.insert(code.end(), {static_cast<int64_t>(Opcode::kReindex), add(other_positions())});
      tree(leaves, steps + 1, 0);
      return;
    }
    if (steps < 6 && random_.one_in(5)) {
      // Far shifts lead back to where tables are, or nearly to the limit: more may follow.
      const bool far = shifted == 0 && random_.one_in(base_ == 0 ? 20 : 3);
      const int64_t by = !far         ? 0
                         : base_ != 0 ? -base_
                                      : random_.pick<int64_t>({kFar - 20, -kFar + 20});
      code.insert(code.end(), {static_cast<int64_t>(Opcode::kShift), by + random_.between(-3, 3),
                               by + random_.between(-3, 3)});
      tree(leaves, steps + 1, by == 0 ? shifted : kFar);
      return;
    }
    if (leaves == 1) {
      leaf();
      return;
    }
    code.push_back(static_cast<int64_t>(random_.pick({Opcode::kAnd, Opcode::kAnd, Opcode::kOr})));
    const int64_t children = random_.between(1, std::min<int64_t>(leaves, 4));
    code.push_back(children);
    for (int64_t i = 0; i < children; ++i) {
      const int64_t rest = children - 1 - i;
      const int64_t of_child = rest == 0 ? leaves : random_.between(1, leaves - rest);
      leaves -= of_child;
      tree(of_child, steps, shifted);
    }
  }

  Random& random_;
  Sample sample_{};
  int64_t bits_heads_ = 1;
  int64_t base_ = 0;
  int64_t table_length_ = 0;
};

}  // namespace attn_mask::fuzz
