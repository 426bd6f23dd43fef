#pragma once

#include <c10/core/DeviceType.h>

#include "attn_mask/export.h"
#include "format/mask_task.h"
#include "format/strided_rows.h"

namespace attn_mask {

/// What a device must be able to do. Everything else in an operator (checks, shapes, allocation) is
/// the same for all devices, Meta included, and is written once.
struct DeviceKernels {
  void (*write_mask)(const MaskTask& task);
  void (*find_next_visible)(const Padding& padding, int64_t batch_size, int64_t* next);
  void (*unmask)(const UnmaskTask& task);
};

/// Called when a library with kernels for `device` is loaded.
ATTN_MASK_API void register_device_kernels(c10::DeviceType device, const DeviceKernels& kernels);

const DeviceKernels& device_kernels(c10::DeviceType device);

}  // namespace attn_mask
