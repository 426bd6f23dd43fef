#pragma once

#include "format/document_params.h"

namespace attn_mask {

void find_documents_cpu(const DocumentParams& params);

}  // namespace attn_mask
