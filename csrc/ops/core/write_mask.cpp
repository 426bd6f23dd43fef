#include "ops/core/write_mask.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "ops/core/device_kernels.h"

namespace attn_mask {

void set_output(MaskParams& params, const at::Tensor& out, const DenseFormat& format) {
  params.batch_size = out.size(0);
  params.heads = out.size(1);
  params.q_length = out.size(2);
  params.kv_length = out.size(3);
  params.format = format;
  params.out = out.data_ptr();
  for (int64_t i = 0; i < 4; ++i) {
    params.out_strides[i] = out.stride(i);
  }
}

PreparedProblem::PreparedProblem(Problem& problem, at::Device device) {
  const auto prepare = device_kernels(device.type()).prepare;
  if (prepare == nullptr) {
    on_host_.emplace(problem);
    return;
  }
  const DeviceTables tables(problem, [&](size_t bytes) {
    on_device_ = at::empty({static_cast<int64_t>(bytes)},
                           at::TensorOptions().dtype(at::kByte).device(device));
    return on_device_.mutable_data_ptr();
  });
  if (tables.size > 0) {
    const c10::OptionalDeviceGuard guard(device);
    prepare(tables);
  }
}

void run(const MaskParams& params, at::Device device) {
  if (params.empty()) {
    return;
  }
  const c10::OptionalDeviceGuard guard(device);
  device_kernels(device.type()).write_mask(params);
}

void prepare_and_run(MaskParams& params, at::Device device, std::optional<uint64_t> unmasked) {
  if (params.empty()) {
    return;
  }
  const PreparedProblem prepared(params, device);
  at::Tensor masked_rows;
  if (unmasked) {
    params.unmasking = {nullptr, *unmasked, true};
    if (const auto find = device_kernels(device.type()).find_masked_rows) {
      masked_rows = at::empty({params.rows()}, at::TensorOptions().dtype(at::kByte).device(device));
      auto* const rows = masked_rows.mutable_data_ptr<uint8_t>();
      find(params, rows);
      params.unmasking.rows = rows;
    }
  }
  run(params, device);
}

void narrow_to_causal(Rule& rule, const std::optional<c10::SymInt>& sliding_window) {
  narrow(rule, Causal{});
  if (sliding_window) {
    narrow(rule, SlidingWindow{std::min(sliding_window->expect_int(), kOpen), kOpen});
  }
}

}  // namespace attn_mask
