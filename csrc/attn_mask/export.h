#pragma once

/// Marks what libattn_mask exports; everything else is hidden.
#define ATTN_MASK_API __attribute__((visibility("default")))
