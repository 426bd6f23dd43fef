#pragma once

#include <cstdint>

namespace attn_mask {

/// Requests huge pages for freshly allocated memory that is about to be written throughout. Most
/// of the time that a large mask takes is the kernel handing out its pages, 4 KiB at a time; where
/// the system gives huge pages on request only ("madvise", the usual setting) this is several
/// times faster. Only whole huge pages within the memory are requested, so that it takes no more of
/// it.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace attn_mask
