// A matrix product whose left operand lies anywhere in rows: nothing is packed, so that a tile that
// was just computed, or a weight as it is stored, multiplies the next one. Internal linkage, as
// simd.h, whose product() takes packed weights.
#pragma once

#include "common/simd.h"

namespace sr_kernels {
namespace SR_KERNELS_ISA {
namespace {

// Rows of C at a time. Five divide the usual widths of a head and of a network (10, 20, 30, 60,
// 180); with kTileVectors columns their accumulators still cover the latency of a multiplication.
constexpr int kRowsAtOnce = 5;

template <typename T, int M, int V>
SR_INLINE void row_product_tile(const T* bias, bool accumulate, int64_t k_count, const T* a,
                                int64_t m_stride, int64_t k_stride, const T* b, int64_t ldb, T* c,
                                int64_t ldc) {
  constexpr int W = Simd<T>::width;
  const T* row[M];
  Vec<T> acc[M][V];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    row[i] = a + i * m_stride;
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) {
      acc[i][j] = bias == nullptr ? Vec<T>{} : broadcast(bias[i]);
      if (accumulate) acc[i][j] += load(c + i * ldc + j * W);
    }
  }
  for (int64_t k = 0; k < k_count; ++k) {
    Vec<T> column[V];
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) {
      column[j] = load(b + k * ldb + j * W);
      keep_in_register(column[j]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Vec<T> value = broadcast(row[i][k * k_stride]);
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) acc[i][j] += value * column[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) store<T>(c + i * ldc + j * W, acc[i][j]);
}

// At most M rows.
template <typename T, int M>
SR_INLINE void row_product_panel(int64_t row_count, const T* bias, bool accumulate, int64_t k_count,
                                 const T* a, int64_t m_stride, int64_t k_stride, const T* b,
                                 int64_t ldb, int64_t p_count, T* c, int64_t ldc) {
  constexpr int W = Simd<T>::width;
  if constexpr (M > 1) {
    if (row_count < M)
      return row_product_panel<T, M - 1>(row_count, bias, accumulate, k_count, a, m_stride,
                                         k_stride, b, ldb, p_count, c, ldc);
  }
  int64_t p = 0;
  for (; p + kTileVectors * W <= p_count; p += kTileVectors * W)
    row_product_tile<T, M, kTileVectors>(bias, accumulate, k_count, a, m_stride, k_stride, b + p,
                                         ldb, c + p, ldc);
  for (; p < p_count; p += W)
    row_product_tile<T, M, 1>(bias, accumulate, k_count, a, m_stride, k_stride, b + p, ldb, c + p,
                              ldc);
}

// C[m, p] = bias[m] (or 0) + C[m, p] (if accumulate) + sum_k A[m, k] B[k, p], for m < m_count and
// p < p_count, a multiple of the vector width. A[m, k] = a[m * m_stride + k * k_stride]; B and C
// are row by row. C overlaps neither.
template <typename T>
void row_product(const T* bias, bool accumulate, int64_t m_count, int64_t k_count, int64_t p_count,
                 const T* a, int64_t m_stride, int64_t k_stride, const T* b, int64_t ldb, T* c,
                 int64_t ldc) {
  constexpr int64_t kBlock = 8 * Simd<T>::width;  // columns of B that stay in L1 meanwhile
  for (int64_t p = 0; p < p_count; p += kBlock) {
    const int64_t columns = min64(kBlock, p_count - p);
    for (int64_t m = 0; m < m_count; m += kRowsAtOnce)
      row_product_panel<T, kRowsAtOnce>(m_count - m, bias == nullptr ? nullptr : bias + m,
                                        accumulate, k_count, a + m * m_stride, m_stride, k_stride,
                                        b + p, ldb, columns, c + m * ldc + p, ldc);
  }
}

}  // namespace
}  // namespace SR_KERNELS_ISA
}  // namespace sr_kernels
