// Tensor-core fragments on the CPU (see cuda_runtime.h): every thread of a warp holds and computes the whole tile.
#pragma once

#include "cuda_bf16.h"

namespace nvcuda::wmma {

struct row_major {};
struct col_major {};
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class V, class Layout = void>
struct fragment {
  static_assert(M == 16 && N == 16 && K == 16);
  float at[16][16];  // [row][column] of the matrix that it is
};

template <class F>
void fill_fragment(F& f, float value) {
  for (auto& row : f.at) {
    for (float& v : row) {
      v = value;
    }
  }
}

template <class Use, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, __nv_bfloat16, Layout>& f, const __nv_bfloat16* from, unsigned stride) {
  for (unsigned i = 0; i < 16; ++i) {
    for (unsigned j = 0; j < 16; ++j) {
      constexpr bool kRows = std::is_same_v<Layout, row_major>;
      f.at[i][j] = __bfloat162float(from[kRows ? i * stride + j : j * stride + i]);
    }
  }
}

template <class C, class A, class B>
void mma_sync(C& d, const A& a, const B& b, const C& c) {
  C sum = c;
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 16; ++j) {
        sum.at[i][j] += a.at[i][k] * b.at[k][j];
      }
    }
  }
  d = sum;
}

template <class C>
void store_matrix_sync(float* to, const C& f, unsigned stride, layout_t layout) {
  for (unsigned i = 0; i < 16; ++i) {
    for (unsigned j = 0; j < 16; ++j) {
      to[layout == mem_row_major ? i * stride + j : j * stride + i] = f.at[i][j];
    }
  }
}

}  // namespace nvcuda::wmma
