// Compares everything that evaluates rules on a CPU with their programs, element by element:
// the decoder, spans, runs of rows, dense kernels of every instruction set, block masks, operators,
// attention.
// Built with AddressSanitizer and UBSan; each input lies in memory of exactly its size.
//
//   fuzz_rules [--seconds S] [--seed N] [--cases N]
//
// Each case has a seed of its own, counted up from the first, and a failure names it: with
// `--seed N --cases 1` it comes again.

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <numeric>
#include <sstream>
#include <string>
#include <utility>

#include "attn_mask/attention.h"
#include "attn_mask/rules.h"
#include "cpu/dispatch.h"
#include "cpu/kernels.h"
#include "format/additive.h"
#include "format/boolean.h"
#include "ops/core/dtypes.h"
#include "ops/core/forms.h"
#include "ops/core/rule_problem.h"
#include "problem.h"
#include "reference.h"
#include "rule/levels/hull.h"
#include "rule/levels/runs.h"
#include "rule/levels/spans.h"
#include "rule/levels/word.h"

// A sanitizer's report is followed by the seed.
extern "C" const char* __asan_default_options();
extern "C" const char* __ubsan_default_options();
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "abort_on_error=1:detect_leaks=0:detect_stack_use_after_return=0";
}
extern "C" __attribute__((visibility("default"))) const char* __ubsan_default_options() {
  return "abort_on_error=1:print_stacktrace=1";
}

namespace attn_mask::fuzz {
namespace {

// What a signal handler writes, since it must not put it together.
char failure[80];

// Cases take milliseconds.
constexpr unsigned kSecondsOfCase = 120;

void on_signal(int number) {
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, failure, std::strlen(failure));
  std::signal(number, SIG_DFL);
  std::raise(number == SIGALRM ? SIGKILL : number);
}

std::string describe(const Sample& sample) {
  std::ostringstream text;
  text << "rule " << sample.code << "\nbatch_size " << sample.batch_size << " heads "
       << sample.heads << " q_length " << sample.q_length << " kv_length " << sample.kv_length
       << " q_offset " << sample.q_offset << " kv_offset " << sample.kv_offset;
  const auto describe = [&](const std::string& name, const at::Tensor& tensor) {
    text << "\n"
         << name << ": " << tensor.scalar_type() << tensor.sizes() << " strides "
         << tensor.strides();
  };
  for (size_t i = 0; i < sample.operands.size(); ++i) {
    describe("operand " + std::to_string(i), sample.operands[i]);
  }
  if (sample.q_positions) {
    describe("q_positions", *sample.q_positions);
  }
  if (sample.kv_positions) {
    describe("kv_positions", *sample.kv_positions);
  }
  return text.str();
}

[[noreturn]] void fail(const std::string& text) {
  std::fprintf(stderr, "%s\n", text.c_str());
  std::abort();
}

void expect(bool condition, const char* what, const Sample& sample) {
  if (!condition) {
    fail(std::string(what) + "\n" + describe(sample));
  }
}

std::vector<std::pair<const char*, const CpuKernels*>> instruction_sets() {
  std::vector<std::pair<const char*, const CpuKernels*>> all{{"default", &isa_default::kKernels}};
#if defined(ATTN_MASK_HAS_X86_KERNELS)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    all.emplace_back("avx2", &isa_avx2::kKernels);
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    all.emplace_back("avx512", &isa_avx512::kKernels);
  }
#endif
  return all;
}

/// The arguments of operators, which take them as SymInts.
struct OperatorArguments {
  explicit OperatorArguments(const Sample& sample)
      : code(sample.code.begin(), sample.code.end()),
        operands(sample.operands),
        batch_size(sample.batch_size),
        q_length(sample.q_length),
        kv_length(sample.kv_length),
        q_offset(sample.q_offset),
        kv_offset(sample.kv_offset),
        q_positions(sample.q_positions),
        kv_positions(sample.kv_positions) {}

  RuleArguments rule() const {
    return {{code, operands, batch_size, q_length, kv_length},
            q_offset,
            kv_offset,
            q_positions,
            kv_positions,
            std::nullopt};
  }

  std::vector<c10::SymInt> code;
  std::vector<at::Tensor> operands;
  c10::SymInt batch_size;
  c10::SymInt q_length;
  c10::SymInt kv_length;
  c10::SymInt q_offset;
  c10::SymInt kv_offset;
  std::optional<at::Tensor> q_positions;
  std::optional<at::Tensor> kv_positions;
};

/// What a sample's mask is, and the block masks that follow from it.
class Mask {
 public:
  explicit Mask(const Sample& sample) : sample_(sample), values_(mask_of(sample)) {}

  bool at(int64_t batch, int64_t head, int64_t row, int64_t column) const {
    return values_[static_cast<size_t>(((batch * sample_.heads + head) * sample_.q_length + row) *
                                           sample_.kv_length +
                                       column)] != 0;
  }

  /// Whether no key is visible in a row.
  bool is_masked(int64_t batch, int64_t head, int64_t row) const {
    for (int64_t column = 0; column < sample_.kv_length; ++column) {
      if (at(batch, head, row, column)) {
        return false;
      }
    }
    return true;
  }

  BlockState state(int64_t batch, int64_t head, Interval rows, Interval columns,
                   int64_t elements) const {
    int64_t count = 0;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      for (int64_t column = columns.begin; column < columns.end; ++column) {
        count += at(batch, head, row, column) ? 1 : 0;
      }
    }
    return count == 0          ? BlockState::kEmpty
           : count == elements ? BlockState::kFull
                               : BlockState::kPartial;
  }

 private:
  const Sample& sample_;
  std::vector<uint8_t> values_;
};

/// One sample, at all levels.
class Check {
 public:
  Check(Random& random, const Sample& sample)
      : random_(random), sample_(sample), arguments_(sample), mask_(sample) {}

  void run() {
    Problem problem{};
    const Decoded decoded =
        decode_problem("fuzz", arguments_.rule(), at::Device(at::kCPU), problem);
    expect(decoded.heads == sample_.heads, "decoded heads", sample_);
    if (!decoded.has_parts && sample_.elements() != 0) {
      problem.batch_size = sample_.batch_size;
      problem.heads = sample_.heads;
      problem.q_length = sample_.q_length;
      problem.kv_length = sample_.kv_length;
      check_elements(problem);
      check_levels(problem);
      // More heads: tables are prepared for a small mask, too.
      Problem prepared_problem = problem;
      prepared_problem.heads = random_.one_in(3) ? problem.heads : 100000;
      const PreparedRuns prepared(prepared_problem);
      prepared_problem.heads = problem.heads;
      check_levels(prepared_problem);
    }
    check_operators();
  }

  /// Boolean masks alone, for programs of which only the decoder is of interest.
  void run_boolean() { check_boolean(); }

 private:
  void check_elements(const Problem& problem) {
    for_each_row([&](int64_t plane, int64_t batch, int64_t head, int64_t row) {
      const Query query = problem.query(plane, row);
      const RowHull hull = row_hull(problem.rule, Hull(problem.rule),
                                    WordPlan(problem.rule, Hull(problem.rule), Positions{}), query);
      for (int64_t column = 0; column < sample_.kv_length; ++column) {
        const Key key = problem.key(batch, column);
        const bool attended = mask_.at(batch, head, row, column);
        expect(attends(problem.rule, query, key) == attended, "element level", sample_);
        const bool inside = hull.positions.contains(key.position);
        expect(attended ? inside : !inside || !hull.exact, "hull", sample_);
      }
    });
  }

  void check_levels(const Problem& problem) {
    check_spans(problem);
    check_runs(problem);
    check_leaves(problem);
    for (const auto& [name, kernels] : instruction_sets()) {
      check_values(problem, name, *kernels);
      check_dense(problem, name, *kernels);
    }
    check_block_mask(problem);
  }

  template <typename Visit>
  void for_each_row(Visit visit) const {
    for (int64_t plane = 0; plane < sample_.batch_size * sample_.heads; ++plane) {
      for (int64_t row = 0; row < sample_.q_length; ++row) {
        visit(plane, plane / sample_.heads, plane % sample_.heads, row);
      }
    }
  }

  void check_row(const Problem& problem, int64_t plane, int64_t row, const RowSpans& spans,
                 const char* what) const {
    const int64_t batch = plane / sample_.heads;
    const Query query = problem.query(plane, row);
    for (int32_t i = 0; i < spans.spans.size; ++i) {
      const Interval span = spans.spans.at[i];
      expect(!span.empty() && span.begin >= (i == 0 ? 0 : spans.spans.at[i - 1].end + 1) &&
                 span.end <= sample_.kv_length,
             what, sample_);
    }
    int32_t next = 0;
    for (int64_t column = 0; column < sample_.kv_length; ++column) {
      while (next < spans.spans.size && spans.spans.at[next].end <= column) {
        ++next;
      }
      bool attended = next < spans.spans.size && spans.spans.at[next].contains(column);
      for (int32_t node = 0; attended && node < problem.rule.size; ++node) {
        attended = ((spans.unresolved >> node) & 1U) == 0 ||
                   attends(problem.rule, node, query, problem.key(batch, column));
      }
      expect(attended == mask_.at(batch, plane % sample_.heads, row, column), what, sample_);
    }
  }

  void check_spans(const Problem& problem) const {
    for_each_row([&](int64_t plane, int64_t, int64_t, int64_t row) {
      const RowSpans spans = row_spans(problem.rule, problem.query(plane, row),
                                       problem.kv_positions, problem.kv_length);
      check_row(problem, plane, row, spans, "spans");
    });
  }

  void check_runs(const Problem& problem) {
    for (int64_t plane = 0; plane < sample_.batch_size * sample_.heads; ++plane) {
      for (int64_t row = 0; row < sample_.q_length;) {
        const int64_t most = random_.between(1, sample_.q_length - row);
        const RowRun run = row_run(problem.rule, problem.query(plane, row), problem.q_positions,
                                   problem.kv_positions, problem.kv_length, most);
        expect(1 <= run.rows && run.rows <= most, "length of a run of rows", sample_);
        for (int64_t i = 0; i < run.rows; ++i, ++row) {
          check_row(problem, plane, row, run.row(i), "run of rows");
        }
      }
    }
  }

  Interval some_columns() {
    const int64_t begin = random_.between(0, sample_.kv_length - 1);
    return {begin, random_.between(begin + 1, std::min(sample_.kv_length, begin + kColumnsAtOnce))};
  }

  void check_leaves(const Problem& problem) {
    for_each_row([&](int64_t plane, int64_t batch, int64_t, int64_t row) {
      const auto leaf = static_cast<int32_t>(random_.between(0, problem.rule.size - 1));
      const Rule::Node& node = problem.rule.nodes[leaf];
      if (node.kind == Rule::Kind::kAnd || node.kind == Rule::Kind::kOr) {
        return;
      }
      const Query query = problem.query(plane, row);
      const Interval context = some_columns();
      const RowSpans found = leaf_spans(problem.rule, leaf, query, problem.kv_positions, context);
      for (int32_t i = 0; i < found.spans.size; ++i) {
        const Interval span = found.spans.at[i];
        expect(context.begin <= span.begin && span.end <= context.end, "a leaf's span", sample_);
      }
      for (int64_t column = context.begin; column < context.end; ++column) {
        bool inside = false;
        for (int32_t i = 0; i < found.spans.size; ++i) {
          inside = inside || found.spans.at[i].contains(column);
        }
        const bool attended = leaf_attends(problem.rule, node, query, problem.key(batch, column));
        expect(attended ? inside : !inside || found.unresolved != 0, "a leaf's spans", sample_);
      }
    });
  }

  void check_values(const Problem& problem, const char* name, const CpuKernels& kernels) {
    for (int64_t trial = 0; trial < 4; ++trial) {
      const int64_t plane = random_.between(0, sample_.batch_size * sample_.heads - 1);
      const Query query = problem.query(plane, random_.between(0, sample_.q_length - 1));
      const Interval columns = some_columns();
      const auto nodes =
          static_cast<uint32_t>(random_.between(1, (int64_t{1} << problem.rule.size) - 1));
      std::vector<uint8_t> out(static_cast<size_t>(columns.end - columns.begin), 7);
      kernels.evaluate(problem, query, nodes, columns, out.data());
      for (int64_t column = columns.begin; column < columns.end; ++column) {
        bool all = true;
        for (int32_t node = 0; node < problem.rule.size; ++node) {
          all = all && (((nodes >> node) & 1U) == 0 ||
                        attends(problem.rule, node, query, problem.key(query.batch, column)));
        }
        expect(out[static_cast<size_t>(column - columns.begin)] == (all ? 1 : 0), name, sample_);
      }
    }
  }

  void check_dense(const Problem& problem, const char* name, const CpuKernels& kernels) {
    MaskParams params{};
    static_cast<Problem&>(params) = problem;
    const at::ScalarType dtype =
        random_.pick({at::kBool, at::kHalf, at::kBFloat16, at::kFloat, at::kDouble});
    params.format = dtype == at::kBool ? kBoolean : additive_format(dtype);
    const int32_t size = params.format.element_size;
    at::Tensor bias;
    if (dtype != at::kBool && random_.one_in(3)) {
      bias = random_bias(dtype, sample_.heads);
      params.bias.data = bias.data_ptr();
      for (int64_t dim = 0; dim < 4; ++dim) {
        params.bias.strides[dim] = bias.size(dim) == 1 ? 0 : bias.stride(dim);
      }
    }
    std::vector<uint8_t> masked_rows(static_cast<size_t>(params.rows()), 7);
    if (random_.one_in(2)) {
      const int64_t middle = random_.between(0, params.rows());
      kernels.find_masked_rows(params, middle, params.rows(), masked_rows.data());
      kernels.find_masked_rows(params, 0, middle, masked_rows.data());
      params.unmasking = {masked_rows.data(),
                          params.bias.data == nullptr ? uint64_t{1} : params.format.attend, true};
    }
    test::set_contiguous(params);
    if (random_.one_in(2)) {
      test::set_random_strides(params, random_.generator);
    }
    // Elements stand anywhere in a cache line.
    const int64_t before = random_.between(0, 70);
    test::Bytes memory(static_cast<size_t>((before + test::reach(params)) * size), 0xA5);
    test::Bytes want = memory;
    params.out = memory.data() + before * size;
    const int64_t most = std::min<int64_t>(kTileBytes / size, params.kv_length);
    const int64_t keys = random_.one_in(2) ? most : random_.between(1, most);
    const Tiling tiling{keys, (params.kv_length + keys - 1) / keys};
    const int64_t tiles = params.rows() * tiling.per_row;
    const int64_t split = random_.between(0, tiles);
    kernels.write_tiles(params, tiling, split, tiles);
    kernels.write_tiles(params, tiling, 0, split);
    for_each_row([&](int64_t plane, int64_t batch, int64_t head, int64_t row) {
      const int64_t offset = before + params.out_offset(problem.query(plane, row));
      const bool unmasked = params.unmasking.rows != nullptr && mask_.is_masked(batch, head, row);
      const uint64_t attend = unmasked ? params.unmasking.value : params.format.attend;
      for (int64_t column = 0; column < sample_.kv_length; ++column) {
        uint64_t bits = params.format.masked;
        if (unmasked || mask_.at(batch, head, row, column)) {
          bits = params.bias.data == nullptr
                     ? attend
                     : get(bias, {bias.size(0) == 1 ? 0 : batch, bias.size(1) == 1 ? 0 : head, row,
                                  column});
        }
        test::put(want, offset + column * params.out_strides[3], size, bits);
      }
    });
    expect(memory == want, name, sample_);
  }

  at::Tensor random_bias(at::ScalarType dtype, int64_t heads) {
    const std::vector<int64_t> sizes{random_.one_in(2) ? 1 : sample_.batch_size,
                                     random_.one_in(2) ? 1 : heads, sample_.q_length,
                                     sample_.kv_length};
    at::Tensor bias = random_layout(random_, sizes, dtype);
    for (int64_t i = 0; i < bias.numel(); ++i) {
      put(bias,
          {i / (sizes[1] * sizes[2] * sizes[3]), i / (sizes[2] * sizes[3]) % sizes[1],
           i / sizes[3] % sizes[2], i % sizes[3]},
          random_.one_in(4) ? 0 : random_.bits());
    }
    return bias;
  }

  /// The sizes of a block mask of the sample.
  BlockMaskParams block_task() {
    BlockMaskParams params{};
    params.batch_size = sample_.batch_size;
    params.heads = sample_.heads;
    params.q_length = sample_.q_length;
    params.kv_length = sample_.kv_length;
    const auto block_size = [&] { return random_.between(1, random_.pick<int64_t>({3, 16, 200})); };
    params.q_block = block_size();
    params.kv_block = block_size();
    params.separate_full = !random_.one_in(4);
    return params;
  }

  std::vector<BlockState> states_of(const BlockMaskParams& params) const {
    std::vector<BlockState> states;
    for (int64_t plane = 0; plane < params.planes(); ++plane) {
      for (int64_t row = 0; row < params.q_blocks(); ++row) {
        for (int64_t column = 0; column < params.kv_blocks(); ++column) {
          states.push_back(mask_.state(plane / params.heads, plane % params.heads,
                                       params.rows_of(row), params.columns_of(column),
                                       params.q_block * params.kv_block));
        }
      }
    }
    return states;
  }

  /// A block mask's numbers in one direction: counts and indices of partial and of full blocks.
  struct Lists {
    std::vector<int32_t> counts[2];
    std::vector<int32_t> indices[2];
    int64_t longest = 0;
  };

  static constexpr int32_t kUntouched = -7;

  /// [batch_size, stored_heads, lines] and [.., width] from states, those of other heads untouched.
  static Lists lists_of(const BlockMaskParams& params, const std::vector<BlockState>& states,
                        bool of_keys, int64_t width) {
    Lists lists;
    const int64_t lines = of_keys ? params.q_blocks() : params.kv_blocks();
    const int64_t total = of_keys ? params.kv_blocks() : params.q_blocks();
    for (size_t kind = 0; kind < 2; ++kind) {
      for (int64_t plane = 0; plane < params.batch_size * params.stored_heads; ++plane) {
        const int64_t head = plane % params.stored_heads;
        const bool is_written = head < params.heads && (kind == 0 || params.separate_full);
        for (int64_t line = 0; line < lines; ++line) {
          std::vector<int32_t> blocks;
          std::vector<int32_t> others;
          for (int64_t i = 0; is_written && i < total; ++i) {
            const int64_t row = of_keys ? line : i;
            const int64_t column = of_keys ? i : line;
            const BlockState state = states[static_cast<size_t>(
                ((plane / params.stored_heads * params.heads + head) * params.q_blocks() + row) *
                    params.kv_blocks() +
                column)];
            const bool is_full = state == BlockState::kFull && params.separate_full;
            const bool is_of_kind = kind == 1 ? is_full : state != BlockState::kEmpty && !is_full;
            (is_of_kind ? blocks : others).push_back(static_cast<int32_t>(i));
          }
          const int64_t count = std::ssize(blocks);
          lists.longest = std::max(lists.longest, count);
          lists.counts[kind].push_back(is_written ? static_cast<int32_t>(count) : kUntouched);
          blocks.insert(blocks.end(), others.begin(), others.end());
          blocks.resize(static_cast<size_t>(width), kUntouched);
          lists.indices[kind].insert(lists.indices[kind].end(), blocks.begin(), blocks.end());
        }
      }
    }
    return lists;
  }

  static Lists untouched(const Lists& like) {
    Lists lists;
    for (size_t kind = 0; kind < 2; ++kind) {
      lists.counts[kind].assign(like.counts[kind].size(), kUntouched);
      lists.indices[kind].assign(like.indices[kind].size(), kUntouched);
    }
    return lists;
  }

  void check_block_mask(const Problem& problem) {
    BlockMaskParams params = block_task();
    static_cast<Problem&>(params) = problem;
    params.stored_heads = params.heads + random_.between(0, 1);
    const auto narrower = [&](int64_t blocks) {
      return random_.one_in(3) ? random_.between(0, blocks) : blocks;
    };
    params.kv_width = narrower(params.kv_blocks());
    params.q_width = narrower(params.q_blocks());
    std::vector<BlockState> want_states = states_of(params);
    std::vector<BlockState> states(want_states.size(), BlockState::kUnknown);
    BlockMaskParams of_states = params;
    of_states.states = states.data();
    find_block_states_cpu(of_states);
    expect(states == want_states, "states of blocks", sample_);
    const bool from_states = random_.one_in(3);
    params.states = from_states ? states.data() : nullptr;
    const Lists want_kv = lists_of(params, want_states, /*of_keys=*/true, params.kv_width);
    const Lists want_q = lists_of(params, want_states, /*of_keys=*/false, params.q_width);
    Lists kv = untouched(want_kv);
    Lists q = untouched(want_q);
    const bool counts_only = random_.one_in(4);
    for (size_t kind = 0; kind < 2; ++kind) {
      params.kv[kind] = {kv.counts[kind].data(), counts_only ? nullptr : kv.indices[kind].data()};
      params.q[kind] = {q.counts[kind].data(), counts_only ? nullptr : q.indices[kind].data()};
    }
    const auto longest = write_block_mask_cpu(params);
    expect(longest && longest->kv == want_kv.longest && longest->q == want_q.longest,
           "longest lines", sample_);
    for (size_t kind = 0; kind < 2; ++kind) {
      expect(kv.counts[kind] == want_kv.counts[kind], "blocks of keys", sample_);
      expect(q.counts[kind] == want_q.counts[kind], "blocks of queries", sample_);
      expect(counts_only || kv.indices[kind] == want_kv.indices[kind], "indices of keys", sample_);
      expect(counts_only || q.indices[kind] == want_q.indices[kind], "indices of queries", sample_);
    }
  }

  void check_operators() {
    check_boolean();
    check_cpp_api();
    check_additive();
    check_block_operators();
    check_attention();
  }

  /// `want(batch, head, row, column)`: the bits.
  template <typename Want>
  void expect_mask(const at::Tensor& mask, int64_t heads, Want want, const char* what) const {
    expect(mask.sizes() ==
               at::IntArrayRef({sample_.batch_size, heads, sample_.q_length, sample_.kv_length}),
           what, sample_);
    for (int64_t batch = 0; batch < sample_.batch_size; ++batch) {
      for (int64_t head = 0; head < heads; ++head) {
        for (int64_t row = 0; row < sample_.q_length; ++row) {
          for (int64_t column = 0; column < sample_.kv_length; ++column) {
            expect(get(mask, {batch, head, row, column}) == want(batch, head, row, column), what,
                   sample_);
          }
        }
      }
    }
  }

  at::Tensor random_out(int64_t heads, at::ScalarType dtype) {
    return random_layout(random_, {sample_.batch_size, heads, sample_.q_length, sample_.kv_length},
                         dtype,
                         /*repeats=*/false);
  }

  void check_boolean() {
    const OperatorArguments& a = arguments_;
    const bool unmasks = random_.one_in(3);
    at::Tensor mask;
    if (random_.one_in(2)) {
      mask = ops::Forms<ops::Boolean>::fresh(a.code, a.operands, a.batch_size, a.q_length,
                                             a.kv_length, a.q_offset, a.kv_offset, a.q_positions,
                                             a.kv_positions, std::nullopt, unmasks,
                                             random_.pick<int64_t>({1, 2, 8, 16}));
    } else {
      mask = random_out(sample_.heads, at::kBool);
      ops::Forms<ops::Boolean>::out(a.code, a.operands, a.batch_size, a.q_length, a.kv_length,
                                    a.q_offset, a.kv_offset, a.q_positions, a.kv_positions,
                                    std::nullopt, unmasks, mask);
    }
    expect_mask(
        mask, sample_.heads,
        [&](int64_t batch, int64_t head, int64_t row, int64_t column) -> uint64_t {
          return mask_.at(batch, head, row, column) ||
                         (unmasks && mask_.is_masked(batch, head, row))
                     ? 1
                     : 0;
        },
        "boolean");
  }

  /// The rule as users of the C++ API write it.
  MaskRule rule_of(const Tree& tree) const {
    const auto operand = [&](int64_t index) -> const at::Tensor& {
      return sample_.operands[static_cast<size_t>(index)];
    };
    const auto side = [](int64_t distance) {
      return distance == -1 ? std::nullopt : std::optional(distance);
    };
    switch (tree.opcode) {
      case Opcode::kAll:
        return bidirectional();
      case Opcode::kCausal:
        return causal();
      case Opcode::kWindow:
        return window(side(tree.a), side(tree.b));
      case Opcode::kChunk:
        return chunked(tree.a, tree.b == -1 ? std::nullopt : std::optional(operand(tree.b)));
      case Opcode::kBlocks:
        return blockwise(operand(tree.a));
      case Opcode::kDocuments:
        return documents(operand(tree.a));
      case Opcode::kPadding:
        return padding(operand(tree.a));
      case Opcode::kBits:
        return bits(operand(tree.a));
      case Opcode::kAnd:
      case Opcode::kOr: {
        MaskRule rule = rule_of(tree.children[0]);
        for (size_t i = 1; i < tree.children.size(); ++i) {
          const MaskRule other = rule_of(tree.children[i]);
          rule = tree.opcode == Opcode::kAnd ? rule & other : rule | other;
        }
        return rule;
      }
      case Opcode::kReindex:
        return reindex(rule_of(tree.children[0]), operand(tree.a));
      case Opcode::kShift:
        return shift(rule_of(tree.children[0]), tree.a, tree.b);
      default:
        return nothing();
    }
  }

  void check_cpp_api() {
    const at::Tensor mask =
        boolean(rule_of(parse(sample_)), sample_.batch_size, sample_.q_length, sample_.kv_length,
                {.q_offset = sample_.q_offset,
                 .kv_offset = sample_.kv_offset,
                 .q_positions = sample_.q_positions,
                 .kv_positions = sample_.kv_positions});
    expect_mask(
        mask, sample_.heads,
        [&](int64_t batch, int64_t head, int64_t row, int64_t column) -> uint64_t {
          return mask_.at(batch, head, row, column) ? 1 : 0;
        },
        "the C++ API");
  }

  void check_additive() {
    const OperatorArguments& a = arguments_;
    const at::ScalarType dtype = random_.pick({at::kHalf, at::kBFloat16, at::kFloat, at::kDouble});
    std::optional<at::Tensor> bias;
    if (random_.one_in(2)) {
      bias = random_bias(dtype, sample_.heads == 1 ? random_.between(1, 3) : sample_.heads);
    }
    const int64_t heads = bias && sample_.heads == 1 ? bias->size(1) : sample_.heads;
    const bool unmasks = random_.one_in(3);
    std::optional<c10::Scalar> masked_value;
    uint64_t masked = additive_format(dtype).masked;
    if (random_.one_in(3)) {
      masked_value = random_.pick({-1.0, -1024.0, -std::numeric_limits<double>::infinity()});
      masked = get(at::full({}, *masked_value, dtype), {});
    }
    at::Tensor mask;
    if (random_.one_in(2)) {
      mask = ops::Forms<ops::Additive>::fresh(
          a.code, a.operands, a.batch_size, a.q_length, a.kv_length, dtype, a.q_offset, a.kv_offset,
          a.q_positions, a.kv_positions, bias, std::nullopt, unmasks, masked_value,
          random_.pick<int64_t>({1, 2, 8, 16}));
    } else {
      mask = random_out(heads, dtype);
      ops::Forms<ops::Additive>::out(a.code, a.operands, a.batch_size, a.q_length, a.kv_length,
                                     dtype, a.q_offset, a.kv_offset, a.q_positions, a.kv_positions,
                                     bias, std::nullopt, unmasks, masked_value, mask);
    }
    expect_mask(
        mask, heads,
        [&](int64_t batch, int64_t head, int64_t row, int64_t column) -> uint64_t {
          const int64_t of_rule = sample_.heads == 1 ? 0 : head;
          if (!mask_.at(batch, of_rule, row, column) &&
              !(unmasks && mask_.is_masked(batch, of_rule, row))) {
            return masked;
          }
          return bias ? get(*bias, {bias->size(0) == 1 ? 0 : batch, bias->size(1) == 1 ? 0 : head,
                                    row, column})
                      : 0;
        },
        "additive");
  }

  /// Attention, beside sums in double over the keys that the mask shows. Offsets are not negative.
  void check_attention() {
    if (sample_.q_offset < 0 || sample_.kv_offset < 0 || sample_.kv_length > 400) {
      return;
    }
    const int64_t heads = sample_.heads == 1 ? random_.between(1, 3) : sample_.heads;
    const int64_t width = random_.pick<int64_t>({1, 4, 16});
    const at::ScalarType dtype = random_.pick({at::kFloat, at::kDouble});
    const auto states = [&](int64_t length) {
      const std::vector<int64_t> sizes{sample_.batch_size, heads, length, width};
      const at::Tensor tensor = random_layout(random_, sizes, dtype, /*repeats=*/false);
      for (int64_t i = 0; i < tensor.numel(); ++i) {
        tensor.as_strided({}, {}, offset_of(tensor, index_of(sizes, i)) / tensor.element_size())
            .fill_(static_cast<double>(random_.between(-100, 100)) / 50);
      }
      return tensor;
    };
    const at::Tensor query = states(sample_.q_length);
    const at::Tensor key = states(sample_.kv_length);
    const at::Tensor value = states(sample_.kv_length);
    const double scale = random_.pick({0.5, 0.1, 1e-30});
    const Attention attention =
        scaled_dot_product_attention(query, key, value, rule_of(parse(sample_)),
                                     {.scale = scale,
                                      .q_offset = sample_.q_offset,
                                      .kv_offset = sample_.kv_offset,
                                      .q_positions = sample_.q_positions,
                                      .kv_positions = sample_.kv_positions});
    const at::Tensor q = query.to(at::kDouble).contiguous();
    const at::Tensor k = key.to(at::kDouble).contiguous();
    const at::Tensor v = value.to(at::kDouble).contiguous();
    const at::Tensor out = attention.out.to(at::kDouble).contiguous();
    const at::Tensor sums = attention.log_sum_exp.to(at::kDouble).contiguous();
    const double tolerance = dtype == at::kFloat ? 1e-4 : 1e-10;
    for_each_of(heads, [&](int64_t batch, int64_t head, int64_t row) {
      const int64_t plane = batch * heads + head;
      const double* const of_query =
          q.const_data_ptr<double>() + (plane * sample_.q_length + row) * width;
      std::vector<double> want(static_cast<size_t>(width));
      double sum = 0;
      for (int64_t column = 0; column < sample_.kv_length; ++column) {
        if (!mask_.at(batch, sample_.heads == 1 ? 0 : head, row, column)) {
          continue;
        }
        const int64_t at = (plane * sample_.kv_length + column) * width;
        const double* const of_key = k.const_data_ptr<double>() + at;
        const double* const of_value = v.const_data_ptr<double>() + at;
        // Scores are at most 32, whose exponential a double holds.
        const double weight =
            std::exp(scale * std::inner_product(of_query, of_query + width, of_key, 0.0));
        sum += weight;
        for (int64_t i = 0; i < width; ++i) {
          want[static_cast<size_t>(i)] += weight * of_value[i];
        }
      }
      const int64_t line = plane * sample_.q_length + row;
      const double got_sum = sums.const_data_ptr<double>()[line];
      expect(sum == 0 ? got_sum == -std::numeric_limits<double>::infinity()
                      : std::abs(got_sum - std::log(sum)) <= 10 * tolerance,
             "the log-sum-exp of attention", sample_);
      for (int64_t i = 0; i < width; ++i) {
        const double of_sum = sum == 0 ? 0 : want[static_cast<size_t>(i)] / sum;
        expect(std::abs(out.const_data_ptr<double>()[line * width + i] - of_sum) <= tolerance,
               "attention", sample_);
      }
    });
  }

  static std::vector<int64_t> index_of(const std::vector<int64_t>& sizes, int64_t i) {
    std::vector<int64_t> index(sizes.size());
    for (size_t dim = sizes.size(); dim-- > 0; i /= sizes[dim]) {
      index[dim] = i % sizes[dim];
    }
    return index;
  }

  template <typename Visit>
  void for_each_of(int64_t heads, Visit visit) const {
    for (int64_t batch = 0; batch < sample_.batch_size; ++batch) {
      for (int64_t head = 0; head < heads; ++head) {
        for (int64_t row = 0; row < sample_.q_length; ++row) {
          visit(batch, head, row);
        }
      }
    }
  }

  void check_block_operators() {
    const OperatorArguments& a = arguments_;
    BlockMaskParams params = block_task();
    const std::vector<BlockState> states = states_of(params);
    const at::Tensor found = ops::BlockStates::run(
        a.code, a.operands, a.batch_size, sample_.heads, a.q_length, a.kv_length, params.q_block,
        params.kv_block, a.q_offset, a.kv_offset, a.q_positions, a.kv_positions, std::nullopt);
    const at::Tensor all = found.expand({params.batch_size, params.heads, -1, -1}).contiguous();
    expect(all.numel() == std::ssize(states) &&
               (states.empty() || std::memcmp(all.data_ptr(), states.data(), states.size()) == 0),
           "_block_states", sample_);
    // Of a rule for all heads there are as many as are wanted.
    const int64_t heads = sample_.heads == 1 ? random_.between(1, 3) : sample_.heads;
    std::vector<BlockState> of_heads;
    for (int64_t batch = 0; batch < params.batch_size; ++batch) {
      const auto plane = params.heads * params.q_blocks() * params.kv_blocks();
      for (int64_t head = 0; head < heads / std::max<int64_t>(sample_.heads, 1); ++head) {
        of_heads.insert(of_heads.end(), states.begin() + batch * plane,
                        states.begin() + (batch + 1) * plane);
      }
    }
    params.heads = params.stored_heads = heads;
    const Lists kv = lists_of(params, of_heads, /*of_keys=*/true, params.kv_blocks());
    const Lists q = lists_of(params, of_heads, /*of_keys=*/false, params.q_blocks());
    const auto widths = ops::BlockMaskWidths::run(
        a.code, a.operands, a.batch_size, heads, a.q_length, a.kv_length, params.q_block,
        params.kv_block, a.q_offset, a.kv_offset, a.q_positions, a.kv_positions, std::nullopt,
        params.separate_full);
    expect(widths.size() == 2 && kv.longest <= widths[0] && widths[0] <= params.kv_blocks() &&
               q.longest <= widths[1] && widths[1] <= params.q_blocks(),
           "_block_mask_widths", sample_);
    const auto random_width = [&](int64_t width, int64_t longest) -> std::optional<int64_t> {
      return random_.one_in(2) ? std::nullopt
                               : std::optional(random_.pick<int64_t>(
                                     {width, longest, longest - 1, width + 3, kMost}));
    };
    const auto kv_width = random_width(widths[0], kv.longest);
    const auto q_width = random_width(widths[1], q.longest);
    const bool fits =
        kv_width.value_or(kMost) >= kv.longest && q_width.value_or(kMost) >= q.longest;
    std::vector<at::Tensor> lists;
    try {
      lists = ops::BlockMask::run(a.code, a.operands, a.batch_size, heads, a.q_length, a.kv_length,
                                  params.q_block, params.kv_block, a.q_offset, a.kv_offset,
                                  a.q_positions, a.kv_positions, std::nullopt, params.separate_full,
                                  kv_width ? std::optional<c10::SymInt>(*kv_width) : std::nullopt,
                                  q_width ? std::optional<c10::SymInt>(*q_width) : std::nullopt);
    } catch (const c10::ValueError&) {
      expect(!fits, "block_mask refused widths", sample_);
      return;
    }
    expect(fits, "block_mask took widths", sample_);
    const size_t kinds = params.separate_full ? 2 : 1;
    expect(lists.size() == 4 * kinds, "lists of block_mask", sample_);
    for (size_t kind = 0; kind < kinds; ++kind) {
      check_lists(lists[2 * kind], lists[2 * kind + 1], params.kv_blocks(), kv_width,
                  kv.counts[kind], kv.indices[kind]);
      check_lists(lists[2 * (kinds + kind)], lists[2 * (kinds + kind) + 1], params.q_blocks(),
                  q_width, q.counts[kind], q.indices[kind]);
    }
  }

  void check_lists(const at::Tensor& counts, const at::Tensor& indices, int64_t total,
                   std::optional<int64_t> width, const std::vector<int32_t>& want_counts,
                   const std::vector<int32_t>& want_indices) const {
    const auto same = [](const at::Tensor& tensor, const std::vector<int32_t>& want) {
      return tensor.numel() == std::ssize(want) &&
             (want.empty() ||
              std::memcmp(tensor.data_ptr(), want.data(), want.size() * sizeof(int32_t)) == 0);
    };
    expect(same(counts, want_counts), "counts of block_mask", sample_);
    if (!width) {
      expect(same(indices, want_indices), "indices of block_mask", sample_);
      return;
    }
    // The first of each line, and zeros that make the last one whole.
    const int64_t stored = std::min(*width, total);
    std::vector<int32_t> compact;
    for (int64_t line = 0; line < std::ssize(want_counts); ++line) {
      const auto first = want_indices.begin() + line * total;
      compact.insert(compact.end(), first, first + stored);
    }
    compact.resize(compact.size() + static_cast<size_t>(total - stored), 0);
    expect(same(indices, compact), "compact indices of block_mask", sample_);
  }

  Random& random_;
  const Sample& sample_;
  OperatorArguments arguments_;
  Mask mask_;
};

/// A program that may be invalid: an error of the caller's, or the mask that it describes.
void check_decoder(Random& random, Drawer& drawer) {
  Sample sample = drawer.sample();
  if (random.one_in(3)) {
    sample.code.clear();
    drawer.garbage(sample.code);
  } else {
    drawer.mutate(sample);
  }
  const OperatorArguments arguments(sample);
  Problem problem{};
  Decoded decoded;
  try {
    decoded = decode_problem("fuzz", arguments.rule(), at::Device(at::kCPU), problem);
  } catch (const c10::ValueError&) {
    return;
  } catch (const c10::TypeError&) {
    return;
  } catch (const c10::NotImplementedError&) {
    return;
  } catch (const std::exception& error) {
    fail(std::string("an error that is not the caller's: ") + error.what() + "\n" +
         describe(sample));
  }
  sample.heads = decoded.heads.expect_int();
  try {
    Check(random, sample).run_boolean();
  } catch (const Invalid& invalid) {
    fail(std::string("taken for a rule, but: ") + invalid.what() + "\n" + describe(sample));
  }
}

/// Rows without a visible key are unmasked, for causality, a window and padding.
void check_unmasked_rows(Random& random, const CpuKernels& kernels) {
  MaskParams params{};
  params.batch_size = random.between(1, 3);
  params.heads = 1;
  params.q_length = random.between(1, 40);
  params.kv_length = params.q_length + random.between(0, random.pick<int64_t>({5, 200}));
  params.q_positions.offset = params.kv_length - params.q_length;
  params.format = random.pick({kAdditiveFloat16, kAdditiveFloat32, kAdditiveFloat64});
  const at::ScalarType dtype = random.pick({at::kBool, at::kShort, at::kInt, at::kLong});
  const at::Tensor memory = random_layout(random, {params.batch_size, params.kv_length}, dtype);
  const int64_t one_in = random.between(1, 30);
  for (int64_t i = 0; i < memory.numel(); ++i) {
    put(memory, {i / params.kv_length, i % params.kv_length}, random.one_in(one_in) ? 1 : 0);
  }
  const Padding padding{memory.data_ptr(),   memory.stride(0),
                        /*head_stride=*/0,
                        /*q_stride=*/0,      memory.stride(1),
                        params.kv_length,    static_cast<int32_t>(memory.element_size()),
                        /*by_column=*/false, bits_between(1, 1)};
  params.rule = make_rule(Causal{}) & make_rule(padding);
  if (random.one_in(2)) {
    params.rule = params.rule & make_rule(SlidingWindow{random.between(0, 9), kOpen});
  }
  const std::vector<uint8_t> want_rows = test::reference_masked_rows(params);
  std::vector<uint8_t> rows(want_rows.size());
  kernels.find_masked_rows(params, 0, params.rows(), rows.data());
  if (rows != want_rows) {
    fail("rows without a key");
  }
  params.unmasking = {rows.data(), /*value=*/1, true};
  test::set_contiguous(params);
  if (random.one_in(2)) {
    test::set_random_strides(params, random.generator);
  }
  const test::Bytes want = test::reference_mask(params);
  test::Bytes got(want.size(), 0xA5);
  params.out = got.data();
  const int64_t keys = random.between(1, params.kv_length);
  const Tiling tiling{keys, (params.kv_length + keys - 1) / keys};
  kernels.write_tiles(params, tiling, 0, params.rows() * tiling.per_row);
  if (got != want) {
    fail("unmasked rows");
  }
}

/// Rows of an existing tensor: `all`, and those that are fully masked unmasked.
void check_strided_rows(Random& random, const CpuKernels& kernels) {
  const at::ScalarType dtype = random.pick({at::kByte, at::kHalf, at::kFloat, at::kDouble});
  const std::vector<int64_t> sizes{random.between(0, 3), random.between(1, 3),
                                   random.between(1, 20), random.between(0, 1500)};
  const at::Tensor tensor = random_layout(random, sizes, dtype);
  const uint64_t sign = sign_bit(dtype);
  const uint64_t least = sign | 0x7B;
  const int64_t masked_rows = random.between(1, 4);
  for (int64_t row = 0; row < sizes[0] * sizes[1] * sizes[2]; ++row) {
    const bool masked = random.one_in(masked_rows);
    const int64_t other = sizes[3] == 0 ? 0 : random.between(0, sizes[3] - 1);
    for (int64_t i = 0; i < sizes[3]; ++i) {
      put(tensor, {row / (sizes[1] * sizes[2]), row / sizes[2] % sizes[1], row % sizes[2], i},
          masked || (i != other && random.one_in(2)) ? least : random.bits());
    }
  }
  UnmaskParams params{};
  for (size_t dim = 0; dim < 3; ++dim) {
    params.in.sizes[dim] = sizes[dim];
    params.in.strides[dim] = tensor.stride(static_cast<int64_t>(dim));
  }
  params.in.data = tensor.const_data_ptr();
  params.in.length = sizes[3];
  params.in.stride = tensor.stride(3);
  params.in.element_size = static_cast<int32_t>(tensor.element_size());
  params.is_min = bits_between(least, least);
  params.sign = sign;
  if (params.in.rows() == 0 || params.in.length == 0) {
    return;  // nothing is evaluated
  }
  for (int64_t row = 0; row < params.in.rows(); ++row) {
    const int64_t begin = random.between(0, params.in.length);
    const int64_t end = random.between(begin, params.in.length);
    bool all = true;
    for (int64_t i = begin; i < end; ++i) {
      all = all && test::get(params.in.data, params.in.row_offset(row) + i * params.in.stride,
                             params.in.element_size) == least;
    }
    if (kernels.all(params.in, params.is_min, row, begin, end) != all) {
      fail("all");
    }
  }
  test::set_random_output(params, random.generator);
  const test::Bytes want = test::reference_unmask(params);
  test::Bytes got(want.size(), 0xA5);
  params.written = got.data();
  const int64_t split = random.between(0, params.in.rows());
  kernels.unmask_rows(params, split, params.in.rows());
  kernels.unmask_rows(params, 0, split);
  if (got != want) {
    fail("unmask_rows");
  }
}

/// The operators on 2-D padding masks: a key is visible where the mask holds 1.
void check_padding_operators(Random& random) {
  const int64_t batch_size = random.between(0, 3);
  const int64_t kv_length =
      random.one_in(8) ? 0 : random.between(1, random.pick<int64_t>({9, 150}));
  const bool causal = random.one_in(2);
  const int64_t q_length = causal ? random.between(0, kv_length) : random.between(0, 20);
  const at::ScalarType dtype = random.pick({at::kHalf, at::kBFloat16, at::kFloat, at::kDouble});
  // Ones and others in each: 1 is 1 in every integer dtype.
  const at::ScalarType of_mask = random.pick({at::kBool, at::kByte, at::kChar, at::kShort, at::kInt,
                                              at::kLong, at::kUInt16, at::kUInt32, at::kUInt64});
  const at::Tensor mask = random_layout(random, {batch_size, kv_length}, of_mask);
  const int64_t visible = random.between(1, 9);
  for (int64_t i = 0; i < mask.numel(); ++i) {
    const uint64_t other = of_mask == at::kBool || random.one_in(2) ? 0 : random.bits() | 2;
    put(mask, {i / kv_length, i % kv_length}, random.one_in(visible) ? 1 : other);
  }
  std::optional<c10::SymInt> window;
  if (causal && random.one_in(2)) {
    window = random.one_in(8) ? kMost : random.between(1, 20);
  }
  const bool unmasks = random.one_in(2);
  at::Tensor got;
  if (random.one_in(2)) {
    got = ops::Forms<ops::To4d>::fresh(mask, q_length, dtype, kv_length, causal, window, unmasks,
                                       random.pick<int64_t>({1, 8}));
  } else {
    got = random_layout(random, {batch_size, 1, q_length, kv_length}, dtype, /*repeats=*/false);
    ops::Forms<ops::To4d>::out(mask, q_length, dtype, kv_length, causal, window, unmasks, got);
  }
  const DenseFormat format = additive_format(dtype);
  // One query without a window attends to all keys.
  const bool is_bounded = causal && (window || q_length > 1);
  for (int64_t batch = 0; batch < batch_size; ++batch) {
    for (int64_t row = 0; row < q_length; ++row) {
      const int64_t q = row + kv_length - q_length;
      std::vector<bool> attended;
      for (int64_t k = 0; k < kv_length; ++k) {
        const bool near = !window || q - k <= window->expect_int();
        attended.push_back(get(mask, {batch, k}) == 1 && (!is_bounded || (k <= q && near)));
      }
      const bool unmasked =
          unmasks && std::none_of(attended.begin(), attended.end(), [](bool one) { return one; });
      for (int64_t k = 0; k < kv_length; ++k) {
        const uint64_t want = unmasked                           ? sign_bit(dtype)
                              : attended[static_cast<size_t>(k)] ? format.attend
                                                                 : format.masked;
        if (get(got, {batch, 0, row, k}) != want) {
          fail("to_4d");
        }
      }
    }
  }
}

/// The operators on masks of any rank: whether all is visible, and rows without a key unmasked.
void check_mask_operators(Random& random) {
  std::vector<int64_t> sizes;
  for (int64_t rank = random.between(0, 6); rank > 0; --rank) {
    sizes.push_back(random.one_in(12) ? 0 : random.between(1, rank == 1 ? 200 : 4));
  }
  const at::ScalarType dtype = random.pick({at::kHalf, at::kBFloat16, at::kFloat, at::kDouble});
  const at::Tensor mask = random_layout(random, sizes, dtype);
  const DenseFormat format = additive_format(dtype);
  const auto index_of = [&](int64_t i) {
    std::vector<int64_t> index(sizes.size());
    for (size_t dim = sizes.size(); dim-- > 0; i /= sizes[dim]) {
      index[dim] = i % sizes[dim];
    }
    return index;
  };
  const int64_t length = sizes.empty() ? 1 : sizes.back();
  const int64_t visible = random.between(1, 300);
  for (int64_t i = 0; i < mask.numel(); ++i) {
    put(mask, index_of(i), random.one_in(visible) ? 0 : format.masked);
  }
  at::Tensor got = ops::Forms<ops::UnmaskUnattended>::fresh(mask, lowest(dtype), 1);
  if (random.one_in(2)) {
    got = random_layout(random, sizes, dtype, /*repeats=*/false);
    ops::Forms<ops::UnmaskUnattended>::out(mask, lowest(dtype), got);
  }
  bool all = true;
  for (int64_t row = 0; row < mask.numel(); row += length) {
    bool any = false;
    for (int64_t i = row; i < row + length; ++i) {
      const bool is_visible = get(mask, index_of(i)) == 0;
      any = any || is_visible;
      all = all && !is_visible;  // its zeros are what is_all_visible finds
    }
    for (int64_t i = row; i < row + length; ++i) {
      if (get(got, index_of(i)) != (any ? get(mask, index_of(i)) : sign_bit(dtype))) {
        fail("_unmask_unattended");
      }
    }
  }
  if (ops::IsAllVisible::run(mask) != all) {
    fail("_is_all_visible");
  }
}

/// Block masks of lengths that no dense mask can have, for bands: least <= k - q <= most.
void check_huge_block_masks(Random& random) {
  constexpr int64_t kOpenSide = int64_t{1} << 61;  // further than any two positions are
  constexpr int64_t kLimit = (int64_t{1} << 59) - 1;
  Sample sample{};
  int64_t least = -kOpenSide;
  int64_t most = kOpenSide;
  const int64_t bands = random.between(1, 3);
  sample.code = {static_cast<int64_t>(Opcode::kAnd), bands};
  const auto any_number = [&] { return random.between(0, int64_t{1} << random.between(1, 60)); };
  const auto any_shift = [&] {
    const int64_t shift = std::min(any_number(), kLimit);
    return random.one_in(2) ? shift : -shift;
  };
  for (int64_t i = 0; i < bands; ++i) {
    int64_t shift = 0;  // of k - q
    if (random.one_in(2)) {
      const int64_t q_add = any_shift();
      const int64_t key_add = any_shift();
      sample.code.insert(sample.code.end(), {static_cast<int64_t>(Opcode::kShift), q_add, key_add});
      shift = key_add - q_add;
    }
    if (random.one_in(2)) {
      sample.code.push_back(static_cast<int64_t>(Opcode::kCausal));
      most = std::min(most, -shift);
      continue;
    }
    const int64_t left = random.one_in(3) ? -1 : any_number();
    const int64_t right = random.one_in(3) ? kMost : any_number();
    sample.code.insert(sample.code.end(), {static_cast<int64_t>(Opcode::kWindow), left, right});
    least = left == -1 ? least : std::max(least, -left - shift);
    most = std::min(most, std::min(right, kOpenSide) - shift);
  }
  const auto block_size = [&] { return int64_t{1} + any_number() % ((int64_t{1} << 31) - 1); };
  const int64_t q_block = block_size();
  const int64_t kv_block = block_size();
  const int64_t q_blocks = random.between(1, 12);
  const int64_t kv_blocks = random.between(1, 12);
  sample.batch_size = sample.heads = 1;
  sample.q_length = q_blocks * q_block - random.between(0, q_block - 1);
  sample.kv_length = kv_blocks * kv_block - random.between(0, kv_block - 1);
  sample.q_offset = any_shift();
  sample.kv_offset = random.one_in(2) ? any_shift() : sample.q_offset;
  const OperatorArguments a(sample);
  const at::Tensor states = ops::BlockStates::run(
      a.code, a.operands, a.batch_size, 1, a.q_length, a.kv_length, q_block, kv_block, a.q_offset,
      a.kv_offset, a.q_positions, a.kv_positions, std::nullopt);
  int64_t longest = 0;
  for (int64_t row = 0; row < q_blocks; ++row) {
    int64_t in_row = 0;
    for (int64_t column = 0; column < kv_blocks; ++column) {
      const int64_t q = sample.q_offset + row * q_block;
      const int64_t k = sample.kv_offset + column * kv_block;
      const int64_t q_end = std::min(q + q_block, sample.q_offset + sample.q_length);
      const int64_t k_end = std::min(k + kv_block, sample.kv_offset + sample.kv_length);
      const bool whole = q_end == q + q_block && k_end == k + kv_block;
      const int64_t nearest = k - (q_end - 1);
      const int64_t furthest = k_end - 1 - q;
      const bool any = std::max(nearest, least) <= std::min(furthest, most);
      const bool all = whole && least <= nearest && furthest <= most;
      const BlockState want = all   ? BlockState::kFull
                              : any ? BlockState::kPartial
                                    : BlockState::kEmpty;
      expect(get(states, {0, 0, row, column}) == static_cast<uint64_t>(want), "states of a band",
             sample);
      in_row += any ? 1 : 0;
    }
    longest = std::max(longest, in_row);
  }
  const auto widths = ops::BlockMaskWidths::run(
      a.code, a.operands, a.batch_size, 1, a.q_length, a.kv_length, q_block, kv_block, a.q_offset,
      a.kv_offset, a.q_positions, a.kv_positions, std::nullopt, /*separate_full_blocks=*/false);
  expect(longest <= widths[0] && widths[0] <= kv_blocks, "widths of a band", sample);
}

void run_case(uint64_t seed) {
  Random random(seed);
  Drawer drawer(random);
  switch (random.between(0, 9)) {
    case 0:
      for (const auto& [name, kernels] : instruction_sets()) {
        check_unmasked_rows(random, *kernels);
        check_strided_rows(random, *kernels);
      }
      check_padding_operators(random);
      check_mask_operators(random);
      check_huge_block_masks(random);
      return;
    case 1:
    case 2:
    case 3:
      check_decoder(random, drawer);
      return;
    default: {
      const Sample sample = drawer.sample();
      Check(random, sample).run();
      return;
    }
  }
}

int run(int argc, char** argv) {
  double seconds = 30;
  uint64_t first = std::random_device{}();
  uint64_t cases = std::numeric_limits<uint64_t>::max();
  for (int i = 1; i < argc; i += 2) {
    const std::string option = argv[i];
    if (i + 1 == argc || (option != "--seconds" && option != "--seed" && option != "--cases")) {
      std::fprintf(stderr, "fuzz_rules [--seconds S] [--seed N] [--cases N]\n");
      return 2;
    }
    if (option == "--seconds") {
      seconds = std::strtod(argv[i + 1], nullptr);
    } else {
      (option == "--seed" ? first : cases) = std::strtoull(argv[i + 1], nullptr, 10);
    }
  }
  for (const int number : {SIGABRT, SIGALRM, SIGFPE, SIGILL}) {
    std::signal(number, on_signal);
  }
  at::set_num_threads(2);
  std::printf("fuzz_rules: from --seed %llu, for %g s\n", static_cast<unsigned long long>(first),
              seconds);
  std::fflush(stdout);
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  uint64_t done = 0;
  for (; done < cases && elapsed() < seconds; ++done) {
    const uint64_t seed = first + done;
    std::snprintf(failure, sizeof(failure), "\nfuzz_rules: failed with --seed %llu --cases 1\n",
                  static_cast<unsigned long long>(seed));
    alarm(kSecondsOfCase);
    try {
      run_case(seed);
    } catch (const std::exception& error) {
      fail(error.what());
    }
  }
  std::printf("fuzz_rules: %llu cases in %.1f s, instruction sets:",
              static_cast<unsigned long long>(done), elapsed());
  for (const auto& [name, kernels] : instruction_sets()) {
    std::printf(" %s", name);
  }
  std::printf("\n");
  return 0;
}

}  // namespace
}  // namespace attn_mask::fuzz

int main(int argc, char** argv) { return attn_mask::fuzz::run(argc, argv); }
