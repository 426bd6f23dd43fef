// The operators that summarize a mask in blocks.

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/max.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <vector>

#include "format/block_mask.h"
#include "ops/core/checks.h"
#include "ops/core/device_kernels.h"
#include "ops/core/operators.h"
#include "ops/core/rule_problem.h"
#include "ops/core/write_mask.h"
#include "rule/levels/hull.h"
#include "rule/levels/runs.h"

namespace attn_mask {
namespace {

/// The arguments of the operators that summarize a mask in blocks.
struct BlockArguments : RuleArguments {
  template <typename Given>
  explicit BlockArguments(const Given& given)
      : RuleArguments(given),
        heads(given.template get<"heads">()),
        q_block_size(given.template get<"q_block_size">()),
        kv_block_size(given.template get<"kv_block_size">()),
        separate_full_blocks(given.template get_or<"separate_full_blocks">(true)) {}

  /// Lists of partial and of full blocks, or of both in one.
  int64_t kinds() const { return separate_full_blocks ? 2 : 1; }

  c10::SymInt heads;
  c10::SymInt q_block_size;
  c10::SymInt kv_block_size;
  bool separate_full_blocks;
};

/// What is known once the arguments have been checked.
struct CheckedBlocks {
  at::Device device;
  Decoded decoded;
  c10::SymInt q_blocks;
  c10::SymInt kv_blocks;
};

// More than any device can spare for indices of blocks: an error that names the alternative.
constexpr int64_t kMostIndexBytes = int64_t{32} << 30;

void check_block_size(const char* op, const char* argument, const c10::SymInt& size) {
  ATTN_MASK_CHECK_SYM_VALUE(
      size.sym_gt(0).sym_and(size.sym_le(std::numeric_limits<int32_t>::max())), op, ": expected ",
      argument, " to be positive and less than 2^31, but got ", size);
}

c10::SymInt blocks_of(const c10::SymInt& length, const c10::SymInt& block_size) {
  return (length + (block_size - 1)) / block_size;
}

/// The product where all are known; the largest number where it does not fit.
std::optional<int64_t> product(std::initializer_list<c10::SymInt> sizes) {
  int64_t result = 1;
  for (const c10::SymInt& size : sizes) {
    const auto known = size.maybe_as_int();
    if (!known) {
      return std::nullopt;
    }
    if (__builtin_mul_overflow(result, std::max<int64_t>(*known, 1), &result)) {
      return std::numeric_limits<int64_t>::max();
    }
  }
  return result;
}

/// Lists to be written: [batch_size, heads, lines] and [batch_size, heads, lines, width].
struct ListsOfBlocks {
  at::Tensor num_blocks;
  at::Tensor indices;  // as it is returned: with a width of the caller's, 1-D, with a tail
  at::Tensor rows;     // the same but for the tail

  BlockLists lists() const {
    return {num_blocks.mutable_data_ptr<int32_t>(), rows.mutable_data_ptr<int32_t>()};
  }

  /// Writes planes that are alike, of which the first is there already, and the tail.
  void complete(int64_t batches, int64_t heads) const {
    for (const at::Tensor& tensor : {num_blocks, rows}) {
      if (heads < tensor.size(1)) {
        const at::Tensor some = tensor.narrow(0, 0, batches);
        some.narrow(1, 1, tensor.size(1) - 1).copy_(some.narrow(1, 0, 1));
      }
      if (batches < tensor.size(0)) {
        tensor.narrow(0, 1, tensor.size(0) - 1).copy_(tensor.narrow(0, 0, 1));
      }
    }
    write_tail();
  }

  /// Writes the lists of a mask without elements: no line has a block, if there are lines.
  void complete_empty() const {
    num_blocks.zero_();
    write_tail();
  }

 private:
  void write_tail() const {
    if (indices.dim() == 1) {
      indices.narrow(0, rows.numel(), indices.numel() - rows.numel()).zero_();
    }
  }
};

/// How many of a line's `total` blocks are stored.
c10::SymInt stored_width(const char* argument, const std::optional<c10::SymInt>& width,
                         const c10::SymInt& total) {
  if (!width) {
    return total;
  }
  ATTN_MASK_CHECK_SYM_VALUE(width->sym_ge(0), ops::BlockMask::kName, ": expected ", argument,
                            " to be at least 0, but got ", *width);
  return width->min(total);
}

ListsOfBlocks make_lists(const BlockArguments& arguments, at::Device device,
                         const c10::SymInt& lines, const c10::SymInt& total,
                         const c10::SymInt& width, bool is_compact) {
  const at::TensorOptions options = at::TensorOptions().dtype(at::kInt).device(device);
  const c10::SymInt& batch_size = arguments.program.batch_size;
  const std::array<c10::SymInt, 4> sizes{batch_size, arguments.heads, lines, width};
  ListsOfBlocks result;
  result.num_blocks = at::empty_symint(c10::SymIntArrayRef(sizes).slice(0, 3), options);
  if (!is_compact) {
    result.indices = result.rows = at::empty_symint(sizes, options);
    return result;
  }
  const c10::SymInt stored = batch_size * arguments.heads * lines * width;
  result.indices = at::empty_symint({stored + (total - width)}, options);
  result.rows = result.indices.narrow_symint(0, 0, stored).view_symint(sizes);
  return result;
}

/// The lists of an index would be larger than any device.
void check_index_bytes(const BlockArguments& arguments, const CheckedBlocks& checked,
                       const c10::SymInt& kv_width, const c10::SymInt& q_width) {
  const c10::SymInt& batch_size = arguments.program.batch_size;
  const c10::SymInt& heads = arguments.heads;
  const int64_t kinds = arguments.kinds();
  const auto of_kv = product({batch_size, heads, checked.q_blocks, kv_width, 4 * kinds});
  const auto of_q = product({batch_size, heads, checked.kv_blocks, q_width, 4 * kinds});
  TORCH_CHECK_VALUE(!of_kv || !of_q || std::max(*of_kv, *of_q) <= kMostIndexBytes / 2,
                    ops::BlockMask::kName, ": expected indices of at most 2^35 bytes, but ",
                    2 * kinds, " of [", batch_size, ", ", heads, ", ", checked.q_blocks, ", ",
                    checked.kv_blocks, "] int32 (or, stored with kv_width and q_width, ", kv_width,
                    " in each row and ", q_width,
                    " in each column) take more; create_block_mask(compact=True) ",
                    "stores only as many as the longest row and column have");
}

/// The states of a problem's blocks, [batches, heads, q_blocks, kv_blocks].
at::Tensor find_states(const char* op, const BlockArguments& arguments,
                       const CheckedBlocks& checked, BlockMaskParams& params) {
  const at::Device device = checked.device;
  const auto empty_states = [&](const BlockMaskParams& part) {
    return at::empty({part.batch_size, part.heads, part.q_blocks(), part.kv_blocks()},
                     at::TensorOptions().dtype(at::kByte).device(device));
  };
  const auto states_of = [&](BlockMaskParams& part) {
    const at::Tensor states = empty_states(part);
    const PreparedProblem prepared(part, device);
    part.states = reinterpret_cast<BlockState*>(states.mutable_data_ptr());
    const c10::OptionalDeviceGuard guard(device);
    device_kernels(device.type()).find_block_states(part);
    return states;
  };
  if (params.empty()) {
    return empty_states(params);
  }
  if (!checked.decoded.has_parts) {
    return states_of(params);
  }
  const at::Tensor states = empty_states(params);
  const int64_t height =
      std::max<int64_t>(1, height_of_parts(params) / params.q_block) * params.q_block;
  evaluate_in_parts(op, arguments.program, params, device, height,
                    [&](int64_t first, const Problem& rows) {
                      BlockMaskParams part = params;
                      static_cast<Problem&>(part) = rows;
                      const at::Tensor of_part = states_of(part);
                      states.narrow(2, first / params.q_block, part.q_blocks()).copy_(of_part);
                    });
  return states;
}

/// Checks the arguments and sets all of `params` (but under Meta) except where to write; of planes
/// that are alike it has one.
CheckedBlocks check_blocks(const char* op, const BlockArguments& arguments,
                           BlockMaskParams& params) {
  check_size(op, "heads", arguments.heads);
  check_block_size(op, "q_block_size", arguments.q_block_size);
  check_block_size(op, "kv_block_size", arguments.kv_block_size);
  for (const c10::SymInt* length : {&arguments.program.q_length, &arguments.program.kv_length}) {
    const auto known = length->maybe_as_int();
    TORCH_CHECK_VALUE(!known || *known <= kOpen, op, ": expected lengths of at most 2^62, but got ",
                      *length);
  }
  const at::Device device = device_of(op, arguments);
  CheckedBlocks checked{device, decode_problem(op, arguments, device, params),
                        blocks_of(arguments.program.q_length, arguments.q_block_size),
                        blocks_of(arguments.program.kv_length, arguments.kv_block_size)};
  check_heads(op, checked.decoded, arguments.heads);
  for (const c10::SymInt* blocks : {&checked.q_blocks, &checked.kv_blocks}) {
    const auto known = blocks->maybe_as_int();
    TORCH_CHECK_VALUE(!known || *known <= std::numeric_limits<int32_t>::max(), op,
                      ": expected less than 2^31 blocks in each direction, with or without "
                      "create_block_mask(compact=True), but got an index of [",
                      checked.q_blocks, ", ", checked.kv_blocks, "]");
  }
  if (!device.is_meta()) {
    params.batch_size = checked.decoded.depends_on_batch ? params.batch_size : 1;
    params.q_block = arguments.q_block_size.expect_int();
    params.kv_block = arguments.kv_block_size.expect_int();
    params.separate_full = arguments.separate_full_blocks;
    params.stored_heads = arguments.heads.expect_int();
  }
  return checked;
}

/// Runs the params on the device; it points nowhere afterwards.
std::optional<LongestLines> write_block_mask(const char* op, const BlockArguments& arguments,
                                             const CheckedBlocks& checked,
                                             BlockMaskParams& params) {
  const DeviceKernels& kernels = device_kernels(checked.device.type());
  const c10::OptionalDeviceGuard guard(checked.device);
  if (checked.decoded.has_parts || kernels.needs_block_states) {
    const at::Tensor states = find_states(op, arguments, checked, params);
    params.states = reinterpret_cast<BlockState*>(states.mutable_data_ptr());
    return kernels.write_block_mask(params);
  }
  const PreparedRuns prepared(params);
  return kernels.write_block_mask(params);
}

/// The blocks of `size` that so many neighbours can touch.
int64_t touched(int64_t neighbours, int64_t size) { return (neighbours + size - 2) / size + 1; }

/// What windows and chunks that hold for the whole rule decide without reading data; leaves of
/// other kinds can but make lines shorter.
std::optional<LongestLines> declared(const BlockMaskParams& params) {
  if (params.q_positions.listed || params.kv_positions.listed) {
    return std::nullopt;
  }
  const Hull hull(params.rule);
  const int64_t chunk = hull.chunk < 0 ? kOpen : params.rule.nodes[hull.chunk].chunk.size;
  int64_t kv = kOpen;  // the furthest apart that keys of a block of queries are, and one
  int64_t q = kOpen;
  if (hull.before < kFar && hull.after < kFar) {
    kv = hull.before + hull.after + params.q_block;
    q = hull.before + hull.after + params.kv_block;
  }
  if (chunk < kFar) {
    // Neighbours lie in chunks that touch.
    kv = std::min(kv, 2 * chunk + params.q_block);
    q = std::min(q, 2 * chunk + params.kv_block);
  }
  if (kv == kOpen) {
    return std::nullopt;
  }
  return LongestLines{std::min(touched(kv, params.kv_block), params.kv_blocks()),
                      std::min(touched(q, params.q_block), params.q_blocks())};
}

}  // namespace

namespace ops {

std::vector<at::Tensor> BlockMask::run(const Given& given) {
  const BlockArguments arguments(given);
  const OptionalSymInt& kv_width = given.get<"kv_width">();
  const OptionalSymInt& q_width = given.get<"q_width">();
  BlockMaskParams params{};
  const CheckedBlocks checked = check_blocks(kName, arguments, params);
  const c10::SymInt of_kv = stored_width("kv_width", kv_width, checked.kv_blocks);
  const c10::SymInt of_q = stored_width("q_width", q_width, checked.q_blocks);
  check_index_bytes(arguments, checked, of_kv, of_q);
  // Of keys, one for each kind of block, then of queries.
  std::vector<ListsOfBlocks> all;
  std::vector<at::Tensor> result;
  const auto kinds = static_cast<size_t>(arguments.kinds());
  for (size_t i = 0; i < 2 * kinds; ++i) {
    all.push_back(i < kinds ? make_lists(arguments, checked.device, checked.q_blocks,
                                         checked.kv_blocks, of_kv, kv_width.has_value())
                            : make_lists(arguments, checked.device, checked.kv_blocks,
                                         checked.q_blocks, of_q, q_width.has_value()));
    result.insert(result.end(), {all.back().num_blocks, all.back().indices});
  }
  if (checked.device.is_meta()) {
    return result;
  }
  if (params.empty() || arguments.program.batch_size == 0 || arguments.heads == 0) {
    for (const ListsOfBlocks& lists : all) {
      lists.complete_empty();
    }
    return result;
  }
  params.kv_width = of_kv.expect_int();
  params.q_width = of_q.expect_int();
  for (size_t kind = 0; kind < kinds; ++kind) {
    params.kv[kind] = all[kind].lists();
    params.q[kind] = all[kinds + kind].lists();
  }
  const std::optional<LongestLines> longest = write_block_mask(kName, arguments, checked, params);
  TORCH_CHECK_VALUE(!longest || longest->kv <= params.kv_width, kName,
                    ": expected kv_width to be at ", "least ", longest->kv,
                    ", the most blocks of keys that a row has, but got ", params.kv_width);
  TORCH_CHECK_VALUE(!longest || longest->q <= params.q_width, kName, ": expected q_width to be at ",
                    "least ", longest->q,
                    ", the most blocks of queries that a column has, but got ", params.q_width);
  for (const ListsOfBlocks& lists : all) {
    lists.complete(params.batch_size, params.heads);
  }
  return result;
}

at::Tensor BlockStates::run(const Given& given) {
  const BlockArguments arguments(given);
  BlockMaskParams params{};
  const CheckedBlocks checked = check_blocks(kName, arguments, params);
  if (checked.device.is_meta()) {
    const c10::SymInt rows =
        checked.decoded.depends_on_batch ? arguments.program.batch_size : c10::SymInt(1);
    return at::empty_symint({rows, checked.decoded.heads, checked.q_blocks, checked.kv_blocks},
                            at::TensorOptions().dtype(at::kByte).device(at::kMeta));
  }
  return find_states(kName, arguments, checked, params);
}

/// A host decision: it may wait for the device.
std::vector<int64_t> BlockMaskWidths::run(const Given& given) {
  const BlockArguments arguments(given);
  BlockMaskParams params{};
  const CheckedBlocks checked = check_blocks(kName, arguments, params);
  TORCH_CHECK_NOT_IMPLEMENTED(!checked.device.is_meta(), kName,
                              ": expected tensors with values, but got device meta");
  if (params.empty()) {
    return {0, 0};
  }
  params.stored_heads = params.heads;
  if (const auto bound = declared(params)) {
    return {bound->kv, bound->q};
  }
  const int64_t kinds = arguments.kinds();
  const auto counts = [&](int64_t lines) {
    return at::empty({kinds, params.planes() * lines},
                     at::TensorOptions().dtype(at::kInt).device(checked.device));
  };
  params.kv_width = params.kv_blocks();
  params.q_width = params.q_blocks();
  const at::Tensor of_kv = counts(params.q_blocks());
  const at::Tensor of_q = counts(params.kv_blocks());
  for (int64_t kind = 0; kind < kinds; ++kind) {
    params.kv[kind] = {of_kv.mutable_data_ptr<int32_t>() + kind * of_kv.size(1), nullptr};
    params.q[kind] = {of_q.mutable_data_ptr<int32_t>() + kind * of_q.size(1), nullptr};
  }
  if (const auto longest = write_block_mask(kName, arguments, checked, params)) {
    return {longest->kv, longest->q};
  }
  if (of_kv.numel() == 0 || of_q.numel() == 0) {
    return {0, 0};
  }
  const at::Tensor both = at::cat({at::max(of_kv).view({1}), at::max(of_q).view({1})}).cpu();
  const auto* const longest = both.const_data_ptr<int32_t>();
  return {longest[0], longest[1]};
}

}  // namespace ops
}  // namespace attn_mask
