#pragma once

/// Marks inline code that the CPU kernels, the CUDA kernels and the host tests of the CUDA kernels
/// share. Inlining is forced because CPU kernels are compiled once per instruction set: an
/// out-of-line copy built with AVX-512 could be the one that the linker keeps for everybody.
/// ATTN_MASK_INLINE_LAMBDA is the same for lambdas, which comes after their parameters. Before a
/// template, ATTN_MASK_ANY_EXECUTION_SPACE: what it is given to call may be for the host alone.
#if defined(__CUDACC__)
#define ATTN_MASK_INLINE __host__ __device__ __forceinline__
#define ATTN_MASK_INLINE_LAMBDA
#define ATTN_MASK_ANY_EXECUTION_SPACE _Pragma("nv_exec_check_disable")
#else
#define ATTN_MASK_INLINE inline __attribute__((always_inline))
#define ATTN_MASK_INLINE_LAMBDA __attribute__((always_inline))
#define ATTN_MASK_ANY_EXECUTION_SPACE
#endif

// Before a loop over elements: many copies of a rule's evaluation would spill registers.
#if defined(__CUDA_ARCH__)
#define ATTN_MASK_ONE_BY_ONE _Pragma("unroll 1")
#else
#define ATTN_MASK_ONE_BY_ONE
#endif

// Before a loop of a few small steps. nvcc unrolls it by itself.
#if defined(__CUDACC__)
#define ATTN_MASK_UNROLL
#elif defined(__clang__)
#define ATTN_MASK_UNROLL _Pragma("unroll")
#else
#define ATTN_MASK_UNROLL _Pragma("GCC unroll 16")
#endif

// Exported by libattn_mask to libattn_mask_cuda. The public headers have the same macro in
// attn_mask/export.h, since this header is not installed.
#define ATTN_MASK_API __attribute__((visibility("default")))
