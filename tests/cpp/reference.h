#pragma once

// What the tests compare kernels with: masks written one element at a time from the rule's
// definition.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <random>
#include <vector>

#include "format/mask_params.h"
#include "format/strided_rows.h"

namespace attn_mask {

/// A rule of one leaf.
inline Rule make_rule(const Leaf& leaf) {
  Rule rule{};
  narrow(rule, leaf);
  return rule;
}

/// Whether two rules fit into one.
inline bool fit_together(const Rule& a, const Rule& b) {
  return a.size + b.size + 1 <= Rule::kMaxNodes && a.steps_size + b.steps_size <= Rule::kMaxSteps;
}

/// `a` and `b`, or `a` or `b`; they must fit together.
inline Rule join(Rule a, const Rule& b, Rule::Kind kind) {
  const int32_t nodes_before = a.size;
  const int32_t steps_before = a.steps_size;
  for (int32_t i = 0; i < b.size; ++i) {
    Rule::Node node = b.nodes[i];
    node.first += nodes_before;
    node.step_begin += steps_before;
    node.step_end += steps_before;
    a.nodes[a.size++] = node;
  }
  for (int32_t i = 0; i < b.steps_size; ++i) {
    a.steps[a.steps_size++] = b.steps[i];
  }
  if (kind == Rule::Kind::kOr) {
    for (int32_t i = 0; i < a.size; ++i) {
      a.nodes[i].conjunct = false;
    }
  }
  Rule::Node& node = a.nodes[a.size++];
  node = Rule::Node{};
  node.kind = kind;
  node.first = 0;
  node.conjunct = kind == Rule::Kind::kAnd;
  return a;
}

inline Rule operator&(const Rule& a, const Rule& b) { return join(a, b, Rule::Kind::kAnd); }
inline Rule operator|(const Rule& a, const Rule& b) { return join(a, b, Rule::Kind::kOr); }

}  // namespace attn_mask

namespace attn_mask::test {

using Bytes = std::vector<uint8_t>;

inline void put(Bytes& bytes, int64_t index, int32_t element_size, uint64_t bits) {
  std::memcpy(bytes.data() + index * element_size, &bits, static_cast<size_t>(element_size));
}

inline uint64_t get(const void* data, int64_t index, int32_t element_size) {
  uint64_t bits = 0;
  std::memcpy(&bits, static_cast<const uint8_t*>(data) + index * element_size,
              static_cast<size_t>(element_size));
  return bits;
}

/// Makes the output contiguous.
inline void set_contiguous(MaskParams& params) {
  params.out_strides[3] = 1;
  params.out_strides[2] = params.kv_length;
  params.out_strides[1] = params.q_length * params.kv_length;
  params.out_strides[0] = params.heads * params.q_length * params.kv_length;
}

/// How many elements of memory the output lies in.
inline int64_t reach(const MaskParams& params) {
  return (params.batch_size - 1) * params.out_strides[0] +
         (params.heads - 1) * params.out_strides[1] +
         (params.q_length - 1) * params.out_strides[2] +
         (params.kv_length - 1) * params.out_strides[3] + 1;
}

/// Strides of an output with gaps, its dimensions in a random order.
inline void set_random_strides(MaskParams& params, std::mt19937& random) {
  const int64_t sizes[] = {params.batch_size, params.heads, params.q_length, params.kv_length};
  int order[] = {3, 2, 1, 0};
  if (random() % 2 == 0) {
    std::shuffle(std::begin(order), std::end(order), random);
  }
  int64_t stride = 1 + random() % 2;
  for (const int dim : order) {
    params.out_strides[dim] = stride;
    stride *= sizes[dim];
    stride += random() % 4;
  }
}

/// Whether no key is visible in a row, by each of its elements.
inline bool is_masked_row(const Problem& problem, const Query& query) {
  for (int64_t key = 0; key < problem.kv_length; ++key) {
    if (attends(problem.rule, query, problem.key(query.batch, key))) {
      return false;
    }
  }
  return true;
}

/// 1 for each of the mask's rows in which no key is visible.
inline std::vector<uint8_t> reference_masked_rows(const Problem& problem) {
  std::vector<uint8_t> rows;
  for (int64_t plane = 0; plane < problem.batch_size * problem.heads; ++plane) {
    for (int64_t row = 0; row < problem.q_length; ++row) {
      rows.push_back(is_masked_row(problem, problem.query(plane, row)) ? 1 : 0);
    }
  }
  return rows;
}

/// The memory of the output, between the elements of which 0xA5 stands.
inline Bytes reference_mask(const MaskParams& params) {
  const int32_t size = params.format.element_size;
  Bytes out(static_cast<size_t>(reach(params) * size), 0xA5);
  for (int64_t plane = 0; plane < params.batch_size * params.heads; ++plane) {
    for (int64_t row = 0; row < params.q_length; ++row) {
      const bool unmasked =
          params.unmasking.rows != nullptr && is_masked_row(params, params.query(plane, row));
      for (int64_t key = 0; key < params.kv_length; ++key) {
        const bool attended =
            attends(params.rule, params.query(plane, row), params.key(plane / params.heads, key));
        const Query query = params.query(plane, row);
        put(out, params.out_offset(query) + key * params.out_strides[3], size,
            unmasked   ? params.unmasking.value
            : attended ? params.format.attend
                       : params.format.masked);
      }
    }
  }
  return out;
}

/// The memory of the output, between the elements of which 0xA5 stands.
inline Bytes reference_unmask(const UnmaskParams& params) {
  const int32_t size = params.in.element_size;
  int64_t reach = (params.in.length - 1) * params.out.stride + 1;
  for (int i = 0; i < StridedRows::kLeading; ++i) {
    reach += (params.out.sizes[i] - 1) * params.out.strides[i];
  }
  Bytes out(static_cast<size_t>((params.in.length == 0 ? 0 : reach) * size), 0xA5);
  for (int64_t row = 0; row < params.in.rows(); ++row) {
    const auto element = [&](int64_t key) {
      return get(params.in.data, params.in.row_offset(row) + key * params.in.stride, size);
    };
    bool open = true;
    for (int64_t key = 0; key < params.in.length; ++key) {
      open = open && element(key) == params.is_min.first;
    }
    for (int64_t key = 0; key < params.in.length; ++key) {
      put(out, params.out.row_offset(row) + key * params.out.stride, size,
          open ? element(key) & params.sign : element(key));
    }
  }
  return out;
}

/// Gives `params` an output of its own, contiguous or with gaps.
inline void set_random_output(UnmaskParams& params, std::mt19937& random) {
  params.out = params.in;
  params.out.stride = 1 + (random() % 3 == 0 ? 1 : 0);
  int64_t stride = params.in.length * params.out.stride + random() % 3;
  for (int i = StridedRows::kLeading - 1; i >= 0; --i) {
    params.out.strides[i] = stride;
    stride *= params.in.sizes[i];
  }
}

inline Chunk chunk(int64_t size) { return {size, Divisor(size), {}, 0}; }

/// A padding leaf over memory of its own, with random values of which about half are visible.
struct RandomPadding {
  Bytes memory;
  Padding leaf;

  RandomPadding(std::mt19937& random, int32_t element_size, int64_t batch_size, int64_t q_length,
                int64_t kv_length, int64_t key_stride, bool per_query) {
    const int64_t row = kv_length * key_stride + 3;
    const int64_t rows = batch_size * (per_query ? q_length : 1);
    const int64_t elements = rows * row + 8;
    memory.resize(static_cast<size_t>(elements * element_size));
    for (int64_t i = 0; i < elements; ++i) {
      put(memory, i, element_size, random() % 2 == 0 ? 1 : random() % 4);
    }
    leaf = {memory.data(),
            per_query ? q_length * row : row,
            /*head_stride=*/0,
            per_query ? row : 0,
            key_stride,
            kv_length,
            element_size,
            /*by_column=*/per_query,
            bits_between(1, 1)};
  }
};

/// A random tree over memory of its own.
struct RandomRule {
  /// Kinds below are leaves.
  static constexpr uint32_t kLeaves = static_cast<uint32_t>(Rule::Kind::kAnd);

  std::vector<test::RandomPadding> paddings;
  std::vector<std::vector<int64_t>> tables;
  int64_t batch_size;
  int64_t q_length;
  int64_t kv_length;

  Table table(std::mt19937& random, int64_t length) {
    std::vector<int64_t> values(static_cast<size_t>(batch_size * length));
    const auto kind = random() % 6;
    // Where numbers go by steps: far beyond 32 bits, too.
    const int64_t steps[] = {-1, 1, 2, -3, int64_t{1} << 33, -(int64_t{1} << 40)};
    const int64_t step = steps[random() % 6];
    const int64_t far[] = {INT64_MIN, INT64_MAX, int64_t{1} << 40, -(int64_t{1} << 33), -7, 0};
    for (int64_t row = 0; row < batch_size; ++row) {
      int64_t value = static_cast<int64_t>(random() % 3) - 1;
      for (int64_t i = 0; i < length; ++i) {
        if (kind == 0) {  // anything
          value = static_cast<int64_t>(random() % 5) - 1;
        } else if (kind == 1) {  // runs
          value += random() % 4 == 0 ? 1 : 0;
        } else if (kind == 2) {  // positions that begin anew
          value = random() % 5 == 0 ? 0 : value + 1;
        } else if (kind == 3) {  // in order
          value = i == 0 ? (step < 0 ? 12 : 0) : value + (random() % 3 == 0 ? 0 : step);
        } else if (kind == 4) {  // in an order that begins anew
          value = i % 7 == 0 ? static_cast<int64_t>(random() % 9) : value + step;
        } else {  // near and far ones
          value = random() % 3 == 0 ? far[random() % 6] : static_cast<int64_t>(random() % 20);
        }
        values[static_cast<size_t>(row * length + i)] = value;
      }
    }
    tables.push_back(std::move(values));
    return {{tables.back().data(), 8}, length, 1, length, {}, {}};
  }

  /// A rule whose last node is of `kind`; none where there is no such kind.
  std::optional<Rule> sample(std::mt19937& random, Rule::Kind kind) {
    const auto upto = [&](uint32_t most) { return static_cast<int64_t>(random() % (most + 1)); };
    switch (kind) {  // no default: a new kind does not compile until there is a sample of it
      case Rule::Kind::kAll:
        return make_rule(All{});
      case Rule::Kind::kNothing:
        return make_rule(Nothing{});
      case Rule::Kind::kCausal:
        return make_rule(Causal{});
      case Rule::Kind::kSlidingWindow:
        return make_rule(SlidingWindow{upto(7), upto(7)});
      case Rule::Kind::kChunk:
        return make_rule(chunk(1 + upto(5)));
      case Rule::Kind::kSameId:
        return make_rule(SameId{table(random, 1 + upto(29)), random() % 2 == 0});
      case Rule::Kind::kPadding:
        paddings.emplace_back(random, 1 << random() % 4, batch_size, q_length, kv_length,
                              1 + random() % 2, random() % 2 == 0);
        return make_rule(paddings.back().leaf);
      case Rule::Kind::kAnd:
        return leaf(random) & leaf(random);
      case Rule::Kind::kOr:
        return leaf(random) | leaf(random);
    }
    return std::nullopt;
  }

  Rule leaf(std::mt19937& random) {
    return *sample(random, static_cast<Rule::Kind>(random() % kLeaves));
  }

  void see_at_other_positions(Rule& leaf, std::mt19937& random) {
    leaf.steps_size = 1 + (random() % 4 == 0 ? 1 : 0);
    for (int32_t i = 0; i < leaf.steps_size; ++i) {
      leaf.steps[i] = random() % 2 == 0
                          ? Rule::Step{static_cast<int64_t>(random() % 5) - 2,
                                       static_cast<int64_t>(random() % 5) - 2, Table{}}
                          : Rule::Step{0, 0, table(random, 25)};
    }
    leaf.nodes[0].step_end = static_cast<int16_t>(leaf.steps_size);
  }

  Rule tree(std::mt19937& random, int depth) {
    if (depth == 0 || random() % 4 == 0) {
      Rule rule = leaf(random);
      if (random() % 3 == 0) {
        see_at_other_positions(rule, random);
      }
      return rule;
    }
    const Rule left = tree(random, depth - 1);
    const Rule right = tree(random, depth - 1);
    if (!fit_together(left, right)) {
      return left;
    }
    return random() % 2 == 0 ? left & right : left | right;
  }
};

}  // namespace attn_mask::test
