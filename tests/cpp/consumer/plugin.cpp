// A library for Python that is linked with attn_mask: torch.ops.attn_mask_consumer.causal(length).

#include <ATen/ATen.h>
#include <attn_mask/attn_mask.h>
#include <torch/library.h>

TORCH_LIBRARY(attn_mask_consumer, m) {
  m.def("causal(int length) -> Tensor",
        [](int64_t length) { return attn_mask::boolean(attn_mask::causal(), 1, length, length); });
}
