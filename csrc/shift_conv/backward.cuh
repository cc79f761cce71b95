// Weight gradients of the shift convolution on CUDA; its other gradients are conv_kernel's.
//
//   dW[m, k] = sum_p dz[m, p] act(S(x))[k, p]      db[m] = sum_p dz[m, p]
//                                                      weight_gradient_kernel, then reduce_kernel
//
// Tile: 64 x 64 of dW a block, 64 pixels at a time, over every `slices`-th tile of pixels; in 16
// bits dz and S(x) lie in shared memory in the order of their maps, in float32 as [m][pixel] and
// [pixel][k]. Each block writes its sums to its own part of a
// workspace, and reduce_kernel adds the parts in order: no atomics, the same bits every time.
// `slices` depends on the sizes alone, not on the GPU.
//
// Floor: dz and x once, e (C_out + C_in) bytes and 2 C_in C_out FLOP a pixel, no exponentials but
// silu's, C_in a pixel; dz is read C_in / 64 times here (rounded up), x C_out / 64 times.
//
// The block's backward, in float32 and above 192 channels (block_backward.cuh has the others), is a
// sequence, with z = W0 S(x) + b0, made again, and dz in memory for as long as the call lasts. Its
// floor, with both on chip, per pixel, C channels in and out, H hidden: 3 e C bytes and 10 C H
// FLOP. Here the FLOP are 10 C H and the bytes, up to C 64 and H 128, e (8 C + 6 H): z, dz and dx
// take e (4 C + 4 H), both weight gradients e (4 C + 2 H).
// Measured fraction: unmeasured, never run on a GPU.
#pragma once

#include "shift_conv/forward.cuh"

namespace sr_kernels {

struct WeightGradientParams {
  ImageSize size;
  int m_count, k_count;
  FeatureMap dz, x;
  Shift shift;
  Activation activation;  // of x, on its way in
  float slope;
  int slices;
  float *weight_parts, *bias_parts;  // (slices, m_count, k_count), (slices, m_count); or nullptr
};

template <typename E>
struct WeightGradientTile {
  static constexpr int kPixels = 64, kColumns = 64;
  using Product = TileProduct<E, kColumns>;
  static constexpr int kLdZ = kPixels + Product::kPad, kLdX = kColumns + Product::kPad;
  static_assert(kPixels == kProductRows && kPixels == kColumns, "tiles may lie transposed");
  static constexpr int kInputAt = kProductRows * kLdZ * static_cast<int>(sizeof(E));
  static constexpr int kSharedBytes = kInputAt + kPixels * kLdX * static_cast<int>(sizeof(E));
  static_assert(kSharedBytes <= kMaxSharedBytes, "starts on every GPU");
};

template <typename E>
__global__ void __launch_bounds__(kBlockThreads, 2) weight_gradient_kernel(WeightGradientParams p) {
  using Tile = WeightGradientTile<E>;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t slice = blockIdx.x;
  const int columns = (p.k_count + Tile::kColumns - 1) / Tile::kColumns;
  const int m0 = static_cast<int>(blockIdx.y) / columns * kProductRows;
  const int k0 = static_cast<int>(blockIdx.y) % columns * Tile::kColumns;
  E* dz = shared_array<E>(0, kProductRows * Tile::kLdZ);
  E* input = shared_array<E>(Tile::kInputAt, Tile::kPixels * Tile::kLdX);
  // In 16 bits both lie as they come; in float32 as TileProduct wants them.
  constexpr bool kMayTranspose = sizeof(E) == 2;
  const bool z_by_pixel = kMayTranspose && p.dz.stride_c == 1;
  const bool x_by_pixel = !kMayTranspose || p.x.stride_c == 1;
  const int stride_m = z_by_pixel ? 1 : Tile::kLdZ, stride_z = z_by_pixel ? Tile::kLdZ : 1;
  const int stride_k = x_by_pixel ? 1 : Tile::kLdX, stride_x = x_by_pixel ? Tile::kLdX : 1;
  const Shift none;
  // Sums of sums: a tile's pixels first, then the tiles.
  typename Tile::Product product;
  float bias = 0.0f;  // of row thread / 4, every fourth pixel of it
  const bool with_weight = p.weight_parts != nullptr;
  const bool with_bias = p.bias_parts != nullptr && k0 == 0;
  const int64_t tiles = (p.size.pixels() + Tile::kPixels - 1) / Tile::kPixels;
#pragma unroll 1
  for (int64_t tile = slice; tile < tiles; tile += p.slices) {
    const PixelRun pixels(p.size, tile * Tile::kPixels);
    __syncthreads();
    load_shifted<E, Tile::kPixels>(dz, stride_m, stride_z, kProductRows, p.dz, p.size, pixels, none,
                                   m0, p.m_count - m0, Activation::kNone, 0.0f, thread);
    if (with_weight)
      load_shifted<E, Tile::kPixels>(input, stride_k, stride_x, Tile::kColumns, p.x, p.size, pixels,
                                     p.shift, k0, p.k_count - k0, p.activation, p.slope, thread);
    finish_copies();
    if (with_weight) {
      typename Tile::Product of_tile;
      if constexpr (!kMayTranspose)
        of_tile.accumulate(dz, Tile::kLdZ, input, Tile::kLdX, Tile::kPixels, thread);
      else if (z_by_pixel && x_by_pixel)
        of_tile.template accumulate<true, false>(dz, Tile::kLdZ, input, Tile::kLdX, Tile::kPixels,
                                                 thread);
      else if (z_by_pixel)
        of_tile.template accumulate<true, true>(dz, Tile::kLdZ, input, Tile::kLdX, Tile::kPixels,
                                                thread);
      else if (x_by_pixel)
        of_tile.accumulate(dz, Tile::kLdZ, input, Tile::kLdX, Tile::kPixels, thread);
      else
        of_tile.template accumulate<false, true>(dz, Tile::kLdZ, input, Tile::kLdX, Tile::kPixels,
                                                 thread);
      product.add(of_tile);
    }
    if (with_bias) {
      float of_tile = 0.0f;
      for (int i = thread % 4; i < Tile::kPixels; i += 4)
        of_tile += to_float(load_shared<E>(dz + thread / 4 * stride_m + i * stride_z));
      bias += of_tile;
    }
  }
  if (with_weight)
    product.visit(thread, [&](int row, int column, float first, float second) {
      const int64_t m = m0 + row, k = k0 + column;
      float* part = p.weight_parts + (slice * p.m_count + m) * p.k_count + k;
      if (m < p.m_count && k < p.k_count) store_global<float>(part, first);
      if (m < p.m_count && k + 1 < p.k_count) store_global<float>(part + 1, second);
    });
  bias += __shfl_xor_sync(kFullWarp, bias, 1);
  bias += __shfl_xor_sync(kFullWarp, bias, 2);
  const int row = m0 + thread / 4;
  if (with_bias && thread % 4 == 0 && row < p.m_count)
    store_global<float>(p.bias_parts + slice * p.m_count + row, bias);
}

// out[i] = sum over slices of parts[slice][i], in order.
template <typename E>
__global__ void __launch_bounds__(kBlockThreads)
    reduce_kernel(const float* parts, int slices, int64_t count, E* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (i >= count) return;
  float sum = 0.0f;
  for (int64_t slice = 0; slice < slices; ++slice)
    sum += load_global<float>(parts + slice * count + i);
  store_global<E>(out + i, from_float<E>(sum));
}

}  // namespace sr_kernels
