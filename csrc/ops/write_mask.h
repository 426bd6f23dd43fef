#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>

#include "format/mask_task.h"
#include "rule/prepare.h"

namespace attn_mask {

/// Says that the task, of `out`'s sizes, writes to it, and how.
void set_output(MaskTask& task, const at::Tensor& out, const DenseFormat& format);

/// The prepare step of a question that is not empty, on its device. Owns what the rule then points
/// to.
class PreparedQuestion {
 public:
  PreparedQuestion(Question& question, at::Device device);

 private:
  std::optional<PreparedTables> on_host_;
  at::Tensor on_device_;
};

/// Runs the task on the device.
void run(const MaskTask& task, at::Device device);

/// The same for a rule whose tables have yet to be prepared; it points nowhere afterwards. With
/// `unmasked`, the bits of an element, rows in which no key is visible hold that (or their bias)
/// throughout.
void prepare_and_run(MaskTask& task, at::Device device,
                     std::optional<uint64_t> unmasked = std::nullopt);

/// Narrows a rule to causal keys, within `sliding_window` before the query where there is a window.
void narrow_to_causal(Rule& rule, const std::optional<c10::SymInt>& sliding_window);

}  // namespace attn_mask
