#pragma once

/// Marks inline code that the CPU kernels, the CUDA kernels and the host tests of the CUDA kernels
/// share. Inlining is forced because CPU kernels are compiled once per instruction set: an
/// out-of-line copy built with AVX-512 could be the one that the linker keeps for everybody.
#if defined(__CUDACC__)
#define ATTN_MASK_INLINE __host__ __device__ __forceinline__
#else
#define ATTN_MASK_INLINE inline __attribute__((always_inline))
#endif

// Before a loop over elements: many copies of a rule's evaluation would spill registers.
#if defined(__CUDA_ARCH__)
#define ATTN_MASK_ONE_BY_ONE _Pragma("unroll 1")
#else
#define ATTN_MASK_ONE_BY_ONE
#endif
