#pragma once

#include <c10/core/Device.h>

#include <algorithm>
#include <array>

namespace attn_mask {

/// Whether attention on a device gives NaN for rows without a key, so that upstream unmasks them
/// there: memory-efficient attention on CUDA and XPU does.
inline constexpr std::array kUnmaskedDevices{at::kCUDA, at::kXPU};
inline bool needs_unmasking(at::Device device) {
  return std::ranges::find(kUnmaskedDevices, device.type()) != kUnmaskedDevices.end();
}

}  // namespace attn_mask
