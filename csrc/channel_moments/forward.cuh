// Mean and covariance of a feature map's channels on CUDA: channel_products_kernel, then
// channel_moments_kernel.
//
//   mean = mean_p x_p,  covariance = mean_p (x_p - mean)(x_p - mean)^T
//
// Tile: 64 x 64 of the covariance a block, of those on its diagonal or below, 64 pixels at a time,
// over every `slices`-th tile of pixels. A block subtracts an origin o, the mean of its first tile,
// from all of them, so that little cancels where means are large, and leaves sum_p (x_p - o) and
// sum_p (x_p - o)(x_p - o)^T, in float32, in its own part of a workspace. x - o has no 16-bit form:
// products are FFMA whatever the type of x. channel_moments_kernel, a thread for each element of
// the covariance, merges the parts in order and in float64 (Chan, Golub, LeVeque, 1979): no
// atomics, the same bits every time, and for any GPU, since the sizes alone decide on the slices.
//
// Floor, per pixel, C channels, e bytes an element: e C bytes, C (C + 1) FLOP, no exponentials.
// Here, with b = C / 64 rounded up: e C b bytes, most of which the second-level cache may serve;
// 64 b (64 b + 64) FLOP, twice the floor's where C is 64. Measured fraction: unmeasured, never run
// on a GPU.
#pragma once

#include "channel_moments/params.h"
#include "common/pixel_tile.cuh"

namespace sr_kernels {

// store(c, p, value) for channels first ... first + rows - 1 of all pixels of a tile: x less the
// channel's origin (shared), 0 where a pixel or, from `channels` on, a channel does not exist.
template <typename E, int kPixels, typename Store>
SR_DEVICE void load_centred(const FeatureMap& x, const PixelRun& pixels, int rows, int first,
                            int channels, const float* origin, int thread, const Store& store) {
#pragma unroll 1
  for (int i = walk_pixel(x, thread); i < kPixels; i += kWalkPixels) {
    const Pixel at = pixels[i];
    const int64_t place = element_offset(x, at.n, first, at.h, at.w);
#pragma unroll 4
    for (int c = walk_channel(x, thread); c < rows; c += kWalkChannels) {
      float value = 0.0f;
      if (at.exists && c < channels)
        value = to_float(load_global<E>(static_cast<const E*>(x.data) + place + c * x.stride_c)) -
                load_shared<float>(origin + c);
      store(c, i, value);
    }
  }
}

struct ChannelProductParams {
  ImageSize size;
  int channels;
  FeatureMap x;
  int slices;
  float *origins, *sums, *products;  // (slices, C), (slices, C), (slices, C, C)
  double *mean, *covariance;
};

struct ChannelProductTile {
  static constexpr int kPixels = 64;
  using Product = TileProduct<float, kProductRows>;
  static constexpr int kLd = kPixels + Product::kPad;  // of [m][pixel] and of [pixel][k]
  static constexpr int kRightAt = 4 * kProductRows * kLd, kOriginAt = 2 * kRightAt;
  static constexpr int kSharedBytes = kOriginAt + 4 * 2 * kProductRows;
  static_assert(kPixels == kProductRows && kSharedBytes <= kMaxSharedBytes);
};

// Blocks that the covariance of `channels` takes: a triangle of its tiles.
SR_HOST_DEVICE int64_t channel_product_blocks(int64_t channels) {
  const int64_t rows = (channels + kProductRows - 1) / kProductRows;
  return rows * (rows + 1) / 2;
}

// Grid: tiles of the covariance, of every slice.
template <typename E>
__global__ void __launch_bounds__(kBlockThreads, 2)
    channel_products_kernel(ChannelProductParams p) {
  using Tile = ChannelProductTile;
  const int thread = static_cast<int>(threadIdx.x);
  const int blocks = static_cast<int>(channel_product_blocks(p.channels));
  const int64_t slice = blockIdx.x / blocks;
  int column = static_cast<int>(blockIdx.x % blocks), row = 0;
  while (column > row) column -= ++row;
  const int m0 = row * kProductRows, k0 = column * kProductRows;
  const bool diagonal = m0 == k0;
  float* left = shared_array<float>(0, kProductRows * Tile::kLd);                 // [m][pixel]
  float* right = shared_array<float>(Tile::kRightAt, Tile::kPixels * Tile::kLd);  // [pixel][k]
  float* origin = shared_array<float>(Tile::kOriginAt, 2 * kProductRows);         // of m, then of k
  const auto load = [&](int64_t tile) {
    const PixelRun pixels(p.size, tile * Tile::kPixels);
    load_centred<E, Tile::kPixels>(p.x, pixels, kProductRows, m0, p.channels - m0, origin, thread,
                                   [&](int c, int i, float value) {
                                     store_shared<float>(left + c * Tile::kLd + i, value);
                                     if (diagonal)
                                       store_shared<float>(right + i * Tile::kLd + c, value);
                                   });
    if (diagonal) return;
    load_centred<E, Tile::kPixels>(
        p.x, pixels, kProductRows, k0, p.channels - k0, origin + kProductRows, thread,
        [&](int c, int i, float value) { store_shared<float>(right + i * Tile::kLd + c, value); });
  };

  const int side = thread / kProductRows, c = thread % kProductRows;  // 0 of m, 1 of k
  // The first tile is loaded as it is; this then makes the origins from it and takes them off.
  const auto centre = [&] {
    const int64_t there = p.size.pixels() - slice * Tile::kPixels;
    const int count = there < Tile::kPixels ? static_cast<int>(there) : Tile::kPixels;
    const auto at = [&](int i) {
      return side == 0 ? left + c * Tile::kLd + i : right + i * Tile::kLd + c;
    };
    float sum = 0.0f;
    for (int i = 0; i < count; ++i) sum += load_shared<float>(at(i));
    const float mean = sum / static_cast<float>(count);
    // Where it is not finite, none: x - inf is no number.
    if (mean - mean != 0.0f) return;
    store_shared<float>(origin + thread, mean);
    for (int i = 0; i < count; ++i) store_shared<float>(at(i), load_shared<float>(at(i)) - mean);
  };

  if (side < 2) store_shared<float>(origin + thread, 0.0f);

  // Sums of sums: a tile's pixels first, then the tiles.
  Tile::Product product;
  float sum = 0.0f;  // of row thread / 4, every fourth pixel of it
  const int64_t tiles = (p.size.pixels() + Tile::kPixels - 1) / Tile::kPixels;
#pragma unroll 1
  for (int64_t tile = slice; tile < tiles; tile += p.slices) {
    __syncthreads();
    load(tile);
    __syncthreads();
    if (tile == slice) {
      if (side < 2) centre();
      __syncthreads();
    }
    Tile::Product of_tile;
    of_tile.accumulate(left, Tile::kLd, right, Tile::kLd, Tile::kPixels, thread);
    product.add(of_tile);
    float sum_of_tile = 0.0f;
    for (int i = thread % 4; i < Tile::kPixels; i += 4)
      sum_of_tile += load_shared<float>(left + thread / 4 * Tile::kLd + i);
    sum += sum_of_tile;
  }
  product.visit(thread, [&](int of_row, int of_column, float first, float second) {
    const int64_t m = m0 + of_row, k = k0 + of_column;
    float* part = p.products + (slice * p.channels + m) * p.channels + k;
    if (m < p.channels && k < p.channels) store_global<float>(part, first);
    if (m < p.channels && k + 1 < p.channels) store_global<float>(part + 1, second);
  });
  sum += __shfl_xor_sync(kFullWarp, sum, 1);
  sum += __shfl_xor_sync(kFullWarp, sum, 2);
  if (!diagonal) return;
  const int64_t part = slice * p.channels + m0;
  if (thread % 4 == 0 && m0 + thread / 4 < p.channels)
    store_global<float>(p.sums + part + thread / 4, sum);
  if (side == 0 && m0 + c < p.channels)
    store_global<float>(p.origins + part + c, load_shared<float>(origin + c));
}

// How many pixels each slice has; the last of all tiles may lack some.
struct SlicePixels {
  int64_t tiles, longer, last, lacking;  // of every slice; slices with one more; of the last tile
  SR_DEVICE explicit SlicePixels(const ChannelProductParams& p) {
    const int64_t all =
        (p.size.pixels() + ChannelProductTile::kPixels - 1) / ChannelProductTile::kPixels;
    tiles = all / p.slices;
    longer = all % p.slices;
    last = (longer == 0 ? p.slices : longer) - 1;
    lacking = all * ChannelProductTile::kPixels - p.size.pixels();
  }
  SR_DEVICE double operator[](int slice) const {
    const int64_t full = (tiles + (slice < longer ? 1 : 0)) * ChannelProductTile::kPixels;
    return static_cast<double>(slice == last ? full - lacking : full);
  }
};

// A thread for each element of the covariance; those of its diagonal write the mean, too.
__global__ inline void __launch_bounds__(kBlockThreads)
    channel_moments_kernel(ChannelProductParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  const int64_t channels = p.channels, a = i / channels, b = i % channels;
  if (a >= channels) return;
  const int64_t m = a > b ? a : b, k = a > b ? b : a;  // (a, b) and (b, a) have the same bits
  const double pixels = static_cast<double>(p.size.pixels());
  const SlicePixels counts(p);
  const auto part = [](const float* parts, int64_t at) {
    return static_cast<double>(load_global<float>(parts + at));
  };
  double mean_m = 0.0, mean_k = 0.0, total = 0.0;
#pragma unroll 2
  for (int slice = 0; slice < p.slices; ++slice) {
    const double count = counts[slice];
    const int64_t first = slice * channels;
    mean_m += part(p.sums, first + m) + count * part(p.origins, first + m);
    mean_k += part(p.sums, first + k) + count * part(p.origins, first + k);
  }
  mean_m /= pixels;
  mean_k /= pixels;
#pragma unroll 2
  for (int slice = 0; slice < p.slices; ++slice) {
    const double count = counts[slice], share = 1.0 / count;
    const int64_t first = slice * channels;
    const double of_m = part(p.sums, first + m), of_k = part(p.sums, first + k);
    const double between_m = part(p.origins, first + m) + of_m * share - mean_m;
    const double between_k = part(p.origins, first + k) + of_k * share - mean_k;
    total += part(p.products, (first + m) * channels + k) - of_m * of_k * share +
             count * between_m * between_k;
  }
  store_global<double>(p.covariance + i, total / pixels);
  if (a == b) store_global<double>(p.mean + a, mean_m);
}

}  // namespace sr_kernels
