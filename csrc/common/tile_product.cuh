// A matrix product by the 256 threads of a block: D (64 x kN) += A (64 x K) B (K x kN), A[m][k] and
// B[k][n] in shared memory as they are written here (16 bit: or transposed), D in registers,
// float32 sums.
//
//   16 bit   mma.sync, warps 2 x 4, each 32 x kN / 4; K in steps of 16
//   float32  FFMA, exact products (no TF32); a warp has 8 rows, a lane pairs of columns; K in steps
//   of 4
//
// Rows of A and B are `kPad` longer than their width, which keeps them aligned and their loads free
// of bank conflicts where the width is a multiple of 64 (of 32 for A).
#pragma once

#include "common/async_copy.cuh"
#include "common/mma.cuh"

namespace sr_kernels {

constexpr int kBlockThreads = 256;
constexpr int kProductRows = 64;

SR_HOST_DEVICE constexpr int round_up(int x, int multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// What K is padded to with zeros: a step of the products.
template <typename E>
constexpr int kStepOfK = sizeof(E) == 2 ? 16 : 4;

template <typename E, int kN>
struct TileProduct {
  static constexpr int kStepK = kStepOfK<E>, kPad = 8;
  static constexpr int kPairs = kN / 64;  // of a warp's fragments of 8 columns
  Accumulator sum[2][2 * kPairs];

  // A is in memory as [k][m] where kAByK, B as [n][k] where kBByN, with only `rows` rows of n: what
  // comes of the columns beyond is of no use.
  template <bool kAByK = false, bool kBByN = false>
  SR_DEVICE void accumulate(const E* a, int lda, const E* b, int ldb, int k_count, int thread,
                            int rows = kN) {
    const int lane = thread % 32, warp = thread / 32;
    const int first_m = warp % 2 * 32, first_n = warp / 2 * (kN / 4);
#pragma unroll 2
    for (int k = 0; k < k_count; k += kStepK) {
      FragmentA fa[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if constexpr (kAByK)
          load_a_from_rows_k(fa[i], a + k * lda + first_m + 16 * i, lda, lane);
        else
          load_a_from_rows_m(fa[i], a + (first_m + 16 * i) * lda + k, lda, lane);
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        FragmentB fb[2];
        if constexpr (kBByN)
          load_b_from_rows_n(fb, b + k, ldb, lane, first_n + 16 * pair, rows);
        else
          load_b_from_rows_k(fb, b + k * ldb + first_n + 16 * pair, ldb, lane);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = 0; j < 2; ++j) multiply_add<E>(sum[i][2 * pair + j], fa[i], fb[j]);
      }
    }
  }

  SR_DEVICE void add(const TileProduct& other) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 2 * kPairs; ++j)
#pragma unroll
        for (int x = 0; x < 4; ++x) sum[i][j].x[x] += other.sum[i][j].x[x];
  }

  // function(row, column, value, value at column + 1) for all that this thread holds.
  template <typename Function>
  SR_DEVICE void visit(int thread, const Function& function) const {
    const int lane = thread % 32, warp = thread / 32;
    const int row = warp % 2 * 32, column = warp / 2 * (kN / 4);
#pragma unroll
    for (int j = 0; j < 2 * kPairs; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int x = 0; x < 4; x += 2)
          function(row + 16 * i + accumulator_row(lane, x),
                   column + 8 * j + accumulator_column(lane, x), sum[i][j].x[x],
                   sum[i][j].x[x + 1]);
  }
};

template <int kN>
struct TileProduct<float, kN> {
  static constexpr int kStepK = kStepOfK<float>, kPad = 8;
  static constexpr int kPairs = kN / 64;  // of columns, 64 apart
  float sum[8][kPairs][2] = {};

  SR_DEVICE void accumulate(const float* a, int lda, const float* b, int ldb, int k_count,
                            int thread) {
    a += thread / 32 * 8 * lda;
    b += thread % 32 * 2;
    for (int k = 0; k < k_count; k += kStepK) {
      Vector<float, 4> left[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) left[i] = load_shared<Vector<float, 4>>(a + i * lda + k);
#pragma unroll
      for (int step = 0; step < kStepK; ++step)
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
          const auto right = load_shared<Vector<float, 2>>(b + (k + step) * ldb + 64 * j);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            sum[i][j][0] += left[i].element[step] * right.element[0];
            sum[i][j][1] += left[i].element[step] * right.element[1];
          }
        }
    }
  }

  SR_DEVICE void add(const TileProduct& other) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        sum[i][j][0] += other.sum[i][j][0];
        sum[i][j][1] += other.sum[i][j][1];
      }
  }

  template <typename Function>
  SR_DEVICE void visit(int thread, const Function& function) const {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < kPairs; ++j)
        function(thread / 32 * 8 + i, thread % 32 * 2 + 64 * j, sum[i][j][0], sum[i][j][1]);
  }
};

// a[m][k] (64 rows, kColumns columns, of which `columns`, a multiple of 4, are written) from a
// dense or transposed matrix in global memory: element (m, k) is matrix[m * stride_m + k *
// stride_k], zero from m_count and k_count on. By asynchronous copies where k is contiguous: the
// caller waits.
template <typename E, int kColumns>
SR_DEVICE void load_weights(E* a, int lda, int columns, const E* matrix, int64_t stride_m,
                            int64_t stride_k, int m_count, int k_count, int thread) {
  const bool along_k = stride_k == 1;  // lanes lie along what is contiguous
  const uint64_t places = place_of<E>(matrix) | static_cast<uint64_t>(stride_m | k_count | columns);
  with_access_width<E>(along_k ? places : 1, [&](auto width) {
    constexpr int kWidth = width;
    if constexpr (kWidth > 1) {
      constexpr int kPieces = kColumns / kWidth;
#pragma unroll 4
      for (int i = thread; i < kProductRows * kPieces; i += kBlockThreads) {
        const int m = i / kPieces, k = i % kPieces * kWidth;
        if (k >= columns) continue;
        const bool there = m < m_count && k < k_count;
        copy_async<kWidth* static_cast<int>(sizeof(E))>(
            a + m * lda + k, there ? matrix + m * stride_m + k : matrix, there);
      }
    } else {
#pragma unroll 4  // more of them at once would take registers from the sums
      for (int i = thread; i < kProductRows * kColumns; i += kBlockThreads) {
        const int m = along_k ? i / kColumns : i % kProductRows;
        const int k = along_k ? i % kColumns : i / kProductRows;
        if (k >= columns) continue;
        E value = from_float<E>(0.0f);
        if (m < m_count && k < k_count)
          value = load_global<E>(matrix + m * stride_m + k * stride_k);
        store_shared<E>(a + m * lda + k, value);
      }
    }
  });
}

}  // namespace sr_kernels
