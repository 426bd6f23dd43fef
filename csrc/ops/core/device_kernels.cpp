#include "ops/core/device_kernels.h"

#include <c10/util/Exception.h>

#include <array>

#include "cpu/dispatch.h"

namespace attn_mask {
namespace {

constexpr auto kDevices = static_cast<size_t>(c10::DeviceType::COMPILE_TIME_MAX_DEVICE_TYPES);

std::array<DeviceKernels, kDevices>& table() {
  static std::array<DeviceKernels, kDevices> kernels = [] {
    std::array<DeviceKernels, kDevices> initial{};
    initial[static_cast<size_t>(c10::DeviceType::CPU)] = {
        .write_mask = &write_mask_cpu,
        .prepare = nullptr,
        .find_masked_rows = &find_masked_rows_cpu,
        .unmask = &unmask_cpu,
        .find_documents = &find_documents_cpu,
        .find_block_states = &find_block_states_cpu,
        .write_block_mask = &write_block_mask_cpu,
        .needs_block_states = false,
    };
    return initial;
  }();
  return kernels;
}

}  // namespace

void register_device_kernels(c10::DeviceType device, const DeviceKernels& kernels) {
  table()[static_cast<size_t>(device)] = kernels;
}

const DeviceKernels& device_kernels(c10::DeviceType device) {
  const DeviceKernels& kernels = table()[static_cast<size_t>(device)];
  TORCH_INTERNAL_ASSERT(kernels.write_mask != nullptr, "no kernels for ", device);
  return kernels;
}

}  // namespace attn_mask
