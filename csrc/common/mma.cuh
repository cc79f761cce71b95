// Matrix products of a warp from 16-bit tiles in shared memory: D (16 x 8, float32) += A (16 x 16)
// B (16 x 8). What a tile's rows are is said by the names: `rows_m` holds A[m][k] at m * ld + k,
// and so on; a row of 8 elements must be 16-byte aligned, and rows that lie 16 bytes (mod 128)
// apart, or an odd multiple of that, keep ldmatrix free of bank conflicts: `conflict_free_stride`.
#pragma once

#include "common/ptx.cuh"

namespace sr_kernels {

struct FragmentA {
  uint32_t x[4];
};
struct FragmentB {
  uint32_t x[2];
};
struct Accumulator {
  float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
};

// Where element i (0..3) of this lane's accumulator lies in the 16 x 8 tile. Elements 0, 1 and 2, 3
// are neighbours in a row.
SR_DEVICE int accumulator_row(int lane, int i) { return lane / 4 + 8 * (i / 2); }
SR_DEVICE int accumulator_column(int lane, int i) { return 2 * (lane % 4) + i % 2; }

// The least row length >= width, in 16-bit elements, whose rows lie an odd multiple of 16 bytes
// apart.
SR_HOST_DEVICE constexpr int conflict_free_stride(int width) { return (((width + 7) / 8) | 1) * 8; }

template <typename E>
SR_DEVICE void load_a_from_rows_m(FragmentA& a, const E* tile, int ld, int lane) {
  load_matrix<false>(a.x, tile + (lane % 16) * ld + lane / 16 * 8);
}
template <typename E>
SR_DEVICE void load_a_from_rows_k(FragmentA& a, const E* tile, int ld, int lane) {
  load_matrix<true>(a.x, tile + (lane % 8 + lane / 16 * 8) * ld + lane / 8 % 2 * 8);
}

// Two B fragments side by side: columns n .. n + 7 and n + 8 .. n + 15.
template <typename E>
SR_DEVICE void load_b_from_rows_n(FragmentB (&b)[2], const E* tile, int ld, int lane) {
  uint32_t x[4];
  load_matrix<false>(x, tile + (lane % 8 + lane / 16 * 8) * ld + lane / 8 % 2 * 8);
  b[0] = {{x[0], x[1]}};
  b[1] = {{x[2], x[3]}};
}
// The same, of rows first .. first + 15 of a tile that has `rows`: the last of them for those
// beyond.
template <typename E>
SR_DEVICE void load_b_from_rows_n(FragmentB (&b)[2], const E* tile, int ld, int lane, int first,
                                  int rows) {
  int row = first + lane % 8 + lane / 16 * 8;
  row = row < rows ? row : rows - 1;
  uint32_t x[4];
  load_matrix<false>(x, tile + row * ld + lane / 8 % 2 * 8);
  b[0] = {{x[0], x[1]}};
  b[1] = {{x[2], x[3]}};
}
template <typename E>
SR_DEVICE void load_b_from_rows_k(FragmentB (&b)[2], const E* tile, int ld, int lane) {
  uint32_t x[4];
  load_matrix<true>(x, tile + (lane % 16) * ld + lane / 16 * 8);
  b[0] = {{x[0], x[1]}};
  b[1] = {{x[2], x[3]}};
}

template <typename E>
SR_DEVICE void multiply_add(Accumulator& d, const FragmentA& a, const FragmentB& b) {
  matrix_multiply_add<E>(d.x, a.x, b.x);
}

}  // namespace sr_kernels
