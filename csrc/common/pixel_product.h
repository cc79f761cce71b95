// A matrix product whose rows are pixels with their channels side by side, as in a channels_last
// image: nothing is transposed on its way in or out. Vectors run along channels of the result.
// Internal linkage, as simd.h.
#pragma once

#include "common/simd.h"

namespace sr_kernels {
namespace SR_KERNELS_ISA {
namespace {

// A register tile: V vectors of as many pixels as there are registers for.
#if defined(__AVX512F__)
constexpr int kPanelVectors = 4, kPanelAccumulators = 24;
#else
constexpr int kPanelVectors = 3, kPanelAccumulators = 12;
#endif
template <int V>
constexpr int kPanelPixels = kPanelAccumulators / V < 8 ? kPanelAccumulators / V : 8;

// Columns of a product dealt to vectors, and these to panels of nearly equal width. The last vector
// overlaps the one before it, so that whole vectors end where the columns do, of which there must
// be a vector's width at least.
template <typename T>
struct Panels {
  static constexpr int W = Simd<T>::width;
  int64_t columns, vectors, count;
  explicit Panels(int64_t columns_)
      : columns(columns_), vectors(ceil_div(columns, W)), count(ceil_div(vectors, kPanelVectors)) {}
  SR_INLINE int64_t begin(int64_t panel) const { return vectors * panel / count; }
  SR_INLINE int64_t column(int64_t vector) const { return min64(vector * W, columns - W); }
  int64_t computed() const { return vectors * W; }  // columns, those twice in the overlap as two
};

// Packs B[k, column] = source[k * k_stride + column * column_stride] for pixel_product():
// computed() * k_count elements, panel behind panel.
template <typename S, typename T>
const T* pack_panels(const S* source, int64_t k_stride, int64_t column_stride, int64_t k_count,
                     int64_t columns, T* destination) {
  const Panels<T> panels(columns);
  T* next = destination;
  for (int64_t panel = 0; panel < panels.count; ++panel)
    for (int64_t k = 0; k < k_count; ++k)
      for (int64_t v = panels.begin(panel); v < panels.begin(panel + 1); ++v) {
        const S* first = source + k * k_stride + panels.column(v) * column_stride;
        if (column_stride == 1)
          store<T>(next, load_vector_of(first));
        else
          for (int64_t l = 0; l < Simd<T>::width; ++l)
            next[l] = to_compute(first[l * column_stride]);
        next += Simd<T>::width;
      }
  return destination;
}

template <typename T, int M, int V, typename Begin, typename End>
SR_INLINE void pixel_tile(int64_t k_count, const T* a, int64_t lda, int64_t m, const T* b,
                          const int64_t* column, const Begin& begin, const End& end) {
  constexpr int W = Simd<T>::width;
  const T* row[M];
  Vec<T> acc[M][V];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    row[i] = a + (m + i) * lda;
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) acc[i][j] = begin(column[j]);
  }
  for (int64_t k = 0; k < k_count; ++k, b += V * W) {
    Vec<T> right[V];
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) {
      right[j] = load(b + j * W);
      // All but one: with 16 registers g++ would sooner or later keep an accumulator in memory.
      if (j < kPanelVectors - 1) keep_in_register(right[j]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Vec<T> value = broadcast(row[i][k]);
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) acc[i][j] += value * right[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) end(m + i, column[j], acc[i][j]);
}
// At most M pixels.
template <typename T, int M, int V, typename Begin, typename End>
SR_INLINE void pixel_tile_of(int64_t pixels, int64_t k_count, const T* a, int64_t lda, int64_t m,
                             const T* b, const int64_t* column, const Begin& begin,
                             const End& end) {
  if constexpr (M > 1) {
    if (pixels < M)
      return pixel_tile_of<T, M - 1, V>(pixels, k_count, a, lda, m, b, column, begin, end);
  }
  pixel_tile<T, M, V>(k_count, a, lda, m, b, column, begin, end);
}
// At most V vectors.
template <typename T, int V, typename Begin, typename End>
SR_INLINE void pixel_panel(int64_t vectors, int64_t m0, int64_t m1, int64_t k_count, const T* a,
                           int64_t lda, const T* b, const int64_t* column, const Begin& begin,
                           const End& end) {
  if constexpr (V > 1) {
    if (vectors < V)
      return pixel_panel<T, V - 1>(vectors, m0, m1, k_count, a, lda, b, column, begin, end);
  }
  constexpr int M = kPanelPixels<V>;
  const int64_t pixels = m1 - m0, tiles = ceil_div(pixels, M);  // of nearly equal height
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t m = m0 + pixels * tile / tiles, next = m0 + pixels * (tile + 1) / tiles;
    pixel_tile_of<T, M, V>(next - m, k_count, a, lda, m, b, column, begin, end);
  }
}

// For every pixel m < pixels and every vector of columns (see Panels) that begins at `column`:
//
//   end(m, column, begin(column) + sum_k A[m, k] B[k, column ...])
//
// A[m, k] = a[m * lda + k]; b comes from pack_panels(). Pixels go in blocks whose A stays in L1
// while all of B passes over them.
template <typename T, typename Begin, typename End>
SR_INLINE void pixel_product(int64_t pixels, int64_t k_count, int64_t columns, const T* a,
                             int64_t lda, const T* b, const Begin& begin, const End& end) {
  const Panels<T> panels(columns);
  const int64_t fit = (int64_t{16} << 10) / (k_count * static_cast<int64_t>(sizeof(T)));
  const int64_t blocks = ceil_div(pixels, max64(fit, kPanelAccumulators));
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t m0 = pixels * block / blocks, m1 = pixels * (block + 1) / blocks;
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      const int64_t first = panels.begin(panel), vectors = panels.begin(panel + 1) - first;
      int64_t column[kPanelVectors];
      for (int64_t j = 0; j < vectors; ++j) column[j] = panels.column(first + j);
      pixel_panel<T, kPanelVectors>(vectors, m0, m1, k_count, a, lda,
                                    b + first * Simd<T>::width * k_count, column, begin, end);
    }
  }
}

}  // namespace
}  // namespace SR_KERNELS_ISA
}  // namespace sr_kernels
