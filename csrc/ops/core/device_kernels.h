#pragma once

#include <c10/core/DeviceType.h>

#include <optional>

#include "format/block_mask.h"
#include "format/document_params.h"
#include "format/mask_params.h"
#include "format/strided_rows.h"
#include "macros.h"
#include "rule/levels/device_tables.h"

namespace attn_mask {

/// What a device must be able to do. Everything else in an operator (checks, shapes, allocation) is
/// the same for all devices, Meta included, and is written once.
struct DeviceKernels {
  void (*write_mask)(const MaskParams& params);
  /// Prepares a rule's tables on the device. Null: done on the host.
  void (*prepare)(const DeviceTables& tables);
  /// 1 for each row of the mask in which no key is visible, else 0. Null: write_mask finds them.
  void (*find_masked_rows)(const Problem& problem, uint8_t* rows);
  void (*unmask)(const UnmaskParams& params);
  void (*find_documents)(const DocumentParams& params);
  void (*find_block_states)(const BlockMaskParams& params);
  /// Where `needs_block_states`, by the parameters' states. Host kernels return what they found; of
  /// others it is not known without waiting for them.
  std::optional<LongestLines> (*write_block_mask)(const BlockMaskParams& params);
  bool needs_block_states;
};

/// Called when a library with kernels for `device` is loaded.
ATTN_MASK_API void register_device_kernels(c10::DeviceType device, const DeviceKernels& kernels);

const DeviceKernels& device_kernels(c10::DeviceType device);

}  // namespace attn_mask
