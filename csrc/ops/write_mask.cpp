#include "ops/write_mask.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "cpu/huge_pages.h"
#include "ops/checks.h"
#include "ops/kernels.h"

namespace attn_mask {

at::Tensor empty_mask(const char* op, const c10::SymInt& batch_size, const c10::SymInt& heads,
                      const c10::SymInt& q_length, const c10::SymInt& kv_length,
                      at::ScalarType dtype, std::optional<at::Device> device) {
  const std::array<c10::SymInt, 4> sizes{batch_size, heads, q_length, kv_length};
  check_addressable(op, sizes, dtype);
  at::Tensor out = at::empty_symint(sizes, at::TensorOptions().dtype(dtype).device(device));
  if (out.is_cpu()) {
    advise_huge_pages(out.data_ptr(), static_cast<int64_t>(out.nbytes()));
  }
  return out;
}

MaskTask mask_task(const at::Tensor& out, const DenseFormat& format) {
  MaskTask task{};
  task.batch_size = out.size(0);
  task.heads = out.size(1);
  task.q_length = out.size(2);
  task.kv_length = out.size(3);
  task.format = format;
  task.out = out.data_ptr();
  for (int64_t i = 0; i < 4; ++i) {
    task.out_strides[i] = out.stride(i);
  }
  return task;
}

void run(const MaskTask& task, at::Device device) {
  const c10::OptionalDeviceGuard guard(device);
  device_kernels(device.type()).write_mask(task);
}

void write_mask(const at::Tensor& out, const Rule& rule, int64_t q_offset,
                const DenseFormat& format) {
  MaskTask task = mask_task(out, format);
  task.rule = rule;
  task.q_positions.offset = q_offset;
  run(task, out.device());
}

Rule causal_rule(const std::optional<c10::SymInt>& sliding_window) {
  Rule rule = make_rule(Causal{});
  if (sliding_window) {
    rule = rule & make_rule(SlidingWindow{std::min(sliding_window->expect_int(), kOpen), kOpen});
  }
  return rule;
}

}  // namespace attn_mask
