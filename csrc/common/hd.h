// Marks index arithmetic that the CPU and the CUDA implementation share.
#pragma once

#ifdef __CUDACC__
#define LORUN_HD __host__ __device__ __forceinline__
#else
#define LORUN_HD inline __attribute__((always_inline))
#endif
