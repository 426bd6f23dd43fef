// A host decision: it waits for the device.

#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>

#include "attention/flash_call.h"
#include "format/document_params.h"
#include "ops/core/checks.h"
#include "ops/core/operators.h"
#include "ops/core/rule_problem.h"

namespace attn_mask::ops {

std::vector<int64_t> FindDocumentLimits::run(const Given& given) {
  const RuleArguments arguments(given);
  const auto& [rule, operands, batch_size, q_length, kv_length] = arguments.program;
  Problem problem{};
  const at::Device of_rule = device_of(kName, arguments);
  const Decoded decoded = decode_problem(kName, arguments, of_rule, problem);
  if (of_rule.is_meta() || decoded.has_parts || batch_size == 0 || q_length == 0) {
    return {};
  }
  const std::optional<FlashRule> of_flash = flash_rule(problem, operands);
  if (!of_flash || !of_flash->ids) {
    return {};
  }
  const at::Tensor& ids = *of_flash->ids;
  const c10::OptionalDeviceGuard guard(ids.device());
  const at::Tensor read = find_documents(ids, ids.size(0), {}, nullptr).to(at::kCPU);
  const auto& found = *static_cast<const FoundDocuments*>(read.const_data_ptr());
  if (found.rise == 0) {
    const at::Tensor sorted = std::get<0>(ids.sort(1));
    const int64_t n = ids.size(1);
    const at::Tensor changes = sorted.narrow(1, 1, n - 1).ne(sorted.narrow(1, 0, n - 1));
    if (changes.sum().item<int64_t>() + ids.size(0) != found.count) {
      return {};  // an id comes again later: that is no run
    }
  }
  const int64_t repeated = ids.size(0) == 1 ? problem.batch_size : 1;
  return {found.count * repeated, found.longest};
}

}  // namespace attn_mask::ops
