// Calls what the library exports and loads it again; prints what failed and exits with 1.
//
//   consumer: prints for which devices there are kernels
//   consumer LIBRARY: loads LIBRARY, the libattn_mask.so it is linked with, twice more

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <attn_mask/attn_mask.h>
#include <dlfcn.h>

#include <iostream>
#include <string>

namespace {

bool failed = false;

void check(bool condition, const char* what) {
  if (!condition) {
    std::cerr << "failed: " << what << '\n';
    failed = true;
  }
}

size_t operators() {
  size_t count = 0;
  for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
    count += name.name.starts_with("attn_mask::") ? 1 : 0;
  }
  return count;
}

void check_masks() {
  namespace m = attn_mask;
  const at::Tensor padding = at::tensor({0, 1, 1}, at::kLong).view({1, 3});
  const at::Tensor embeds = at::zeros({1, 3, 4});
  const at::Tensor sees = at::tensor({0, 0, 0, 0, 1, 0, 0, 1, 1}).to(at::kBool).view({1, 1, 3, 3});
  const auto shows = [&](const at::Tensor& mask) { return at::equal(mask.eq(0), sees); };
  check(shows(m::AttentionMaskConverter(true).to_4d(padding, 3, at::kFloat, 3)), "to_4d");
  check(shows(*m::prepare_4d_causal_attention_mask(padding, {1, 3}, embeds, 0)), "prepare");
  check(shows(*m::prepare_4d_causal_attention_mask_for_sdpa(padding, {1, 3}, embeds, 0)), "sdpa");
  check(m::create_4d_causal_attention_mask({1, 3}, at::kHalf, at::kCPU)->size(3) == 3, "create");
  check(m::make_causal_mask({2, 3}, at::kHalf, at::kCPU).size(0) == 2, "make_causal_mask");
  check(m::expand_mask(padding, at::kFloat).size(2) == 3, "expand_mask");
  check(m::prepare_4d_attention_mask(padding, at::kFloat).size(2) == 3, "prepare_4d");
  check(m::prepare_4d_attention_mask_for_sdpa(padding, at::kFloat).has_value(), "4d for sdpa");
  check(m::unmask_unattended(embeds, 0.0).size(2) == 4, "unmask_unattended");
  check(!m::ignore_causal_mask_sdpa(padding, embeds, 0), "ignore_causal_mask_sdpa");
  const m::MaskRule rule = m::causal() & m::padding(padding);
  check(at::equal(m::boolean(rule, 1, 3, 3), sees), "boolean");
  check(shows(m::additive(rule, 1, 3, 3, {.dtype = at::kBFloat16})), "additive");
  check(m::block_mask(rule, 1, 3, 3).kv_num_blocks.item<int>() == 1, "block_mask");
  try {
    m::chunked(0);
    check(false, "an error");
  } catch (const c10::ValueError& error) {
    check(std::string(error.what_without_backtrace()) == "chunked: expected size not to be 0",
          "the text of an error");
  }
}

}  // namespace

int main(int argc, char** argv) {
  check_masks();
  const size_t before = operators();
  check(before > 0, "operators are registered");
  for (int i = 0; argc > 1 && i < 2; ++i) {
    check(dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL) != nullptr, "loading the library again");
    check(operators() == before, "operators are registered once");
    check_masks();
  }
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("attn_mask::to_4d", "");
  std::cout << (op.hasKernelForDispatchKey(c10::DispatchKey::CPU) ? "cpu" : "")
            << (op.hasKernelForDispatchKey(c10::DispatchKey::CUDA) ? " cuda" : "") << '\n';
  return failed ? 1 : 0;
}
