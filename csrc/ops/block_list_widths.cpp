// A host decision: it may wait for the device.

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/max.h>

#include <algorithm>
#include <array>

#include "ops/block_lists.h"
#include "ops/core/operators.h"
#include "rule/levels/hull.h"

namespace attn_mask {
namespace {

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
