#include "ops/write_mask.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "ops/kernels.h"

namespace attn_mask {

void set_output(MaskTask& task, const at::Tensor& out, const DenseFormat& format) {
  task.batch_size = out.size(0);
  task.heads = out.size(1);
  task.q_length = out.size(2);
  task.kv_length = out.size(3);
  task.format = format;
  task.out = out.data_ptr();
  for (int64_t i = 0; i < 4; ++i) {
    task.out_strides[i] = out.stride(i);
  }
}

PreparedQuestion::PreparedQuestion(Question& question, at::Device device) {
  const auto prepare = device_kernels(device.type()).prepare;
  if (prepare == nullptr) {
    on_host_.emplace(question);
    return;
  }
  const DeviceTables tables(question, [&](size_t bytes) {
    on_device_ = at::empty({static_cast<int64_t>(bytes)},
                           at::TensorOptions().dtype(at::kByte).device(device));
    return on_device_.mutable_data_ptr();
  });
  if (tables.size > 0) {
    const c10::OptionalDeviceGuard guard(device);
    prepare(tables);
  }
}

void run(const MaskTask& task, at::Device device) {
  if (task.empty()) {
    return;
  }
  const c10::OptionalDeviceGuard guard(device);
  device_kernels(device.type()).write_mask(task);
}

void prepare_and_run(MaskTask& task, at::Device device, std::optional<uint64_t> unmasked) {
  if (task.empty()) {
    return;
  }
  const PreparedQuestion prepared(task, device);
  at::Tensor masked_rows;
  if (unmasked) {
    task.unmasking = {nullptr, *unmasked, true};
    if (const auto find = device_kernels(device.type()).find_masked_rows) {
      masked_rows = at::empty({task.rows()}, at::TensorOptions().dtype(at::kByte).device(device));
      auto* const rows = masked_rows.mutable_data_ptr<uint8_t>();
      find(task, rows);
      task.unmasking.rows = rows;
    }
  }
  run(task, device);
}

void narrow_to_causal(Rule& rule, const std::optional<c10::SymInt>& sliding_window) {
  narrow(rule, Causal{});
  if (sliding_window) {
    narrow(rule, SlidingWindow{std::min(sliding_window->expect_int(), kOpen), kOpen});
  }
}

}  // namespace attn_mask
