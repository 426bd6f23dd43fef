#pragma once

/// Marks inline code that the CPU kernels, the CUDA kernels and the host tests of the CUDA kernels
/// share. Inlining is forced because CPU kernels are compiled once per instruction set: an
/// out-of-line copy built with AVX-512 could be the one that the linker keeps for everybody.
/// ATTN_MASK_INLINE_LAMBDA is the same for lambdas, which comes after their parameters.
#if defined(__CUDACC__)
#define ATTN_MASK_INLINE __host__ __device__ __forceinline__
#define ATTN_MASK_INLINE_LAMBDA
#else
#define ATTN_MASK_INLINE inline __attribute__((always_inline))
#define ATTN_MASK_INLINE_LAMBDA __attribute__((always_inline))
#endif

// Before a function for host and device that calls what it is given, which may be the host's alone.
#if defined(__CUDACC__)
#define ATTN_MASK_CALLS_ANY _Pragma("nv_exec_check_disable")
#else
#define ATTN_MASK_CALLS_ANY
#endif

// Before a loop over elements: many copies of a rule's evaluation would spill registers.
#if defined(__CUDA_ARCH__)
#define ATTN_MASK_ONE_BY_ONE _Pragma("unroll 1")
#else
#define ATTN_MASK_ONE_BY_ONE
#endif
