// Writes one mask by the bodies of the CUDA kernels over an emulated grid, for callgrind to count
// (scripts/cuda_cost.py). Prints the number of 16-byte stores.

#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "emulated_grid.h"
#include "format/additive.h"
#include "reference.h"

namespace attn_mask {
namespace {

constexpr int64_t kBatch = 4;
constexpr int64_t kLength = 2048;

/// What is counted.
__attribute__((noinline)) void count_me(const MaskParams& params) {
  test::emulate_write_mask<uint16_t>(params);
}

}  // namespace
}  // namespace attn_mask

int main(int arguments, char** values) {
  using namespace attn_mask;
  std::vector<int64_t> padding(kBatch * kLength);
  std::vector<int64_t> ids(kLength);
  std::vector<int64_t> blocks(kLength);
  for (int64_t i = 0; i < kBatch * kLength; ++i) {
    padding[static_cast<size_t>(i)] = i % kLength >= 100 * (i / kLength);
  }
  for (size_t i = 0; i < kLength; ++i) {
    ids[i] = static_cast<int64_t>(i) / 300;
    blocks[i] = i % 500 < 100 ? static_cast<int64_t>(i) / 500 : -1;
  }
  const Rule causal = make_rule(Causal{});
  const Rule window = make_rule(SlidingWindow{511, kOpen});
  const Rule documents = make_rule(SameId{{{ids.data(), 8}, 0, 1, kLength, {}, {}}, false});
  const Rule images = make_rule(SameId{{{blocks.data(), 8}, 0, 1, kLength, {}, {}}, true});
  const Rule visible = make_rule(Padding{
      padding.data(), kLength, 0, 0, 1, kLength, 8, false, {~uint64_t{0}, 1, ~uint64_t{0} - 1}});
  const std::map<std::string, Rule> cases = {
      {"causal", causal},
      {"causal+padding", causal & visible},
      {"causal+window+padding", causal & window & visible},
      {"causal+window+documents+padding", causal & window & documents & visible},
      {"causal|blocks+padding", (causal | images) & visible}};
  const auto found = arguments == 2 ? cases.find(values[1]) : cases.end();
  if (found == cases.end()) {
    for (const auto& [name, rule] : cases) {
      std::printf("%s\n", name.c_str());
    }
    return arguments == 1 ? 0 : 2;
  }
  std::vector<Pack> out(kBatch * kLength * kLength / kPackSize<uint16_t>);
  MaskParams params{};
  params.rule = found->second;
  params.batch_size = kBatch;
  params.heads = 1;
  params.q_length = params.kv_length = kLength;
  params.format = kAdditiveBFloat16;
  params.out = out.data();
  test::set_contiguous(params);
  const test::DevicePrepared prepared(params);
  count_me(prepared.params);
  std::printf("%zu\n", out.size());
  return 0;
}
