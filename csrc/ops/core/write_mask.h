#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>

#include "format/mask_params.h"
#include "rule/levels/runs.h"

namespace attn_mask {

/// Says that the params, of `out`'s sizes, writes to it, and how.
void set_output(MaskParams& params, const at::Tensor& out, const DenseFormat& format);

/// The prepare step of a problem that is not empty, on its device. Owns what the rule then points
/// to.
class PreparedProblem {
 public:
  PreparedProblem(Problem& problem, at::Device device);

 private:
  std::optional<PreparedRuns> on_host_;
  at::Tensor on_device_;
};

/// Runs the params on the device.
void run(const MaskParams& params, at::Device device);

/// The same for a rule whose tables have yet to be prepared; it points nowhere afterwards. With
/// `unmasked`, the bits of an element, rows in which no key is visible hold that (or their bias)
/// throughout.
void prepare_and_run(MaskParams& params, at::Device device,
                     std::optional<uint64_t> unmasked = std::nullopt);

/// Narrows a rule to causal keys, within `sliding_window` before the query where there is a window.
void narrow_to_causal(Rule& rule, const std::optional<c10::SymInt>& sliding_window);

}  // namespace attn_mask
