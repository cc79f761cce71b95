// Mean and covariance of a feature map's channels on CUDA, backward: fold_moments_gradient_kernel,
// then channel_moments_gradient_kernel.
//
//   dx_p = (dmean + (G + G^T)(x_p - mean)) / pixels,  G the gradient of the covariance
//
// The first kernel leaves (G + G^T) / pixels, dmean / pixels and the mean in float32, a thread for
// each element of G.
//
// Tile: 64 channels of dx and 128 consecutive pixels a block, input channels in pieces of 64.
// x - mean, float32, in shared memory as [channel][pixel]; it and G / pixels have no 16-bit form
// (the latter is too small for float16): products are FFMA whatever the type of x. Sums pass
// through shared memory, so that the store runs along memory in either layout.
//
// Floor, per pixel, C channels, e bytes an element: 2 e C bytes, 2 C^2 FLOP, no exponentials. Here
// x is read C / 64 times (rounded up); output channels are padded to 64, input channels to 4.
// Measured fraction: unmeasured, never run on a GPU.
#pragma once

#include "channel_moments/forward.cuh"

namespace sr_kernels {

struct ChannelMomentsGradientParams {
  ImageSize size;
  int channels;
  FeatureMap x, dx;
  const double *mean, *mean_gradient, *covariance_gradient;
  float *weight, *start, *origin;  // (G + G^T) / pixels, dmean / pixels, mean
};

__global__ inline void __launch_bounds__(kBlockThreads)
    fold_moments_gradient_kernel(ChannelMomentsGradientParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  const int64_t channels = p.channels, m = i / channels, k = i % channels;
  if (m >= channels) return;
  const double pixels = static_cast<double>(p.size.pixels());
  const double both = load_global<double>(p.covariance_gradient + i) +
                      load_global<double>(p.covariance_gradient + k * channels + m);
  store_global<float>(p.weight + i, static_cast<float>(both / pixels));
  if (m != k) return;
  store_global<float>(p.start + m,
                      static_cast<float>(load_global<double>(p.mean_gradient + m) / pixels));
  store_global<float>(p.origin + m, static_cast<float>(load_global<double>(p.mean + m)));
}

struct ChannelMomentsGradientTile {
  static constexpr int kPixels = 128, kK = 64;
  using Product = TileProduct<float, kPixels>;
  using Stage = SumStage<kPixels>;
  static constexpr int kLdW = kK + Product::kPad, kLdX = kPixels + Product::kPad;
  static constexpr int kInputAt = 4 * kProductRows * kLdW, kOriginAt = kInputAt + 4 * kK * kLdX;
  static constexpr int kOperandBytes = kOriginAt + 4 * kK;
  static constexpr int kSharedBytes = kOperandBytes > Stage::kBytes ? kOperandBytes : Stage::kBytes;
  static_assert(kSharedBytes <= kMaxSharedBytes, "starts on every GPU");
};

// Grid: tiles of pixels, pieces of 64 channels of dx.
template <typename E>
__global__ void __launch_bounds__(kBlockThreads, 2)
    channel_moments_gradient_kernel(ChannelMomentsGradientParams p) {
  using Tile = ChannelMomentsGradientTile;
  const int thread = static_cast<int>(threadIdx.x);
  const int m0 = static_cast<int>(blockIdx.y) * kProductRows;
  const int m_count = p.channels - m0 < kProductRows ? p.channels - m0 : kProductRows;
  const PixelRun pixels(p.size, static_cast<int64_t>(blockIdx.x) * Tile::kPixels);
  float* weight = shared_array<float>(0, kProductRows * Tile::kLdW);
  float* input = shared_array<float>(Tile::kInputAt, Tile::kK * Tile::kLdX);
  float* origin = shared_array<float>(Tile::kOriginAt, Tile::kK);

  Tile::Product product;
#pragma unroll 1
  for (int k0 = 0; k0 < p.channels; k0 += Tile::kK) {
    const int k_count = p.channels - k0 < Tile::kK ? p.channels - k0 : Tile::kK;
    const int k_padded = round_up(k_count, kStepOfK<float>);
    if (k0 > 0) __syncthreads();
    load_weights<float, Tile::kK>(weight, Tile::kLdW, k_padded,
                                  p.weight + static_cast<int64_t>(m0) * p.channels + k0, p.channels,
                                  1, m_count, k_count, thread);
    if (thread < k_count)
      store_shared<float>(origin + thread, load_global<float>(p.origin + k0 + thread));
    __syncthreads();
    load_centred<E, Tile::kPixels>(
        p.x, pixels, k_padded, k0, k_count, origin, thread,
        [&](int c, int i, float value) { store_shared<float>(input + c * Tile::kLdX + i, value); });
    finish_copies();
    product.accumulate(weight, Tile::kLdW, input, Tile::kLdX, k_padded, thread);
  }
  __syncthreads();
  const Tile::Stage stage(p.dx);
  stage.put(product, static_cast<const float*>(p.start) + m0, m_count, thread);
  __syncthreads();
  stage.visit<E>(
      run_places<E>(p.dx, stage.by_pixel), pixels, p.size.width, m_count, thread,
      [&](const Pixel& at, int c, int, auto& value) { put_run<E>(value, p.dx, at, m0 + c); });
}

}  // namespace sr_kernels
