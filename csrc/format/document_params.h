#pragma once

#include <cstdint>

#include "rule/math/limits.h"
#include "rule/math/table.h"

namespace attn_mask {

/// What is found of documents. Read back as int64 [4].
struct FoundDocuments {
  int64_t count;    // of all rows
  int64_t longest;  // tokens
  int64_t rise;     // 1 where ids fall in no row, so that each is one document
  int64_t fit;      // 1 where there are no more than `max_documents`, of at most `max_length`
};

/// Documents of rows of tokens, one row after the other: each is of tokens of a row that follow one
/// another and have the same id.
struct DocumentParams {
  Table ids;  // of at least one token
  int64_t rows;
  int64_t max_documents;
  int64_t max_length;
  int32_t* borders;  // [max_documents + 1]: where documents begin, then the total; null: not wanted
  FoundDocuments* found;

  /// At most INT32_MAX.
  ATTN_MASK_INLINE int64_t total() const { return rows * ids.length; }

  ATTN_MASK_INLINE void set_found(int64_t count, int64_t longest, bool rise) const {
    const bool fit = count <= max_documents && longest <= max_length;
    *found = {count, longest, rise ? 1 : 0, fit ? 1 : 0};
  }
};

static_assert(sizeof(DocumentParams) <= kMaxParameterBytes);

}  // namespace attn_mask
