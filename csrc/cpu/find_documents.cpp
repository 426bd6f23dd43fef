#include <algorithm>

#include "cpu/dispatch.h"

namespace attn_mask {

void find_documents_cpu(const DocumentParams& params) {
  int64_t count = 0;
  int64_t longest = 0;
  int64_t begin = 0;
  bool rise = true;
  const int64_t total = params.total();
  for (int64_t token = 0; token < total; ++token) {
    const int64_t row = token / params.ids.length;
    const int64_t position = token % params.ids.length;
    if (position > 0) {
      const int64_t before = params.ids.at(row, position - 1);
      const int64_t id = params.ids.at(row, position);
      rise = rise && id >= before;
      if (id == before) {
        continue;
      }
    }
    longest = std::max(longest, token - begin);
    begin = token;
    if (params.borders != nullptr && count <= params.max_documents) {
      params.borders[count] = static_cast<int32_t>(token);
    }
    ++count;
  }
  if (params.borders != nullptr && count <= params.max_documents) {
    std::fill(params.borders + count, params.borders + params.max_documents + 1,
              static_cast<int32_t>(total));
  }
  params.set_found(count, std::max(longest, total - begin), rise);
}

}  // namespace attn_mask
