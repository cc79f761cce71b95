// A 3x3 convolution on CUDA, inference only.
//
//   y = act(conv2d(x, w, padding=1) + bias + skip)      pack_weight_kernel, then conv3x3_kernel
//
// An implicit matrix product, tap by tap: y[m][p] += sum over k of w[m][k][r][s] x[k][p + (r, s)],
// nine of them with the input shifted, which never leaves shared memory.
//
// Tile: 64 output channels x 16 x 16 pixels a block, input channels in slices of 64 (float32: 16),
// with a halo of one pixel, 18 x 18. 16 bit: the input lies as [pixel][channel], so that any shift
// of it is a matrix of aligned rows; mma.sync, float32 sums. float32: [channel][pixel], FFMA, exact
// (no TF32); three taps of a row share what a thread has read. Weights come through a ring of three
// buffers, one tap (a row of taps) each, asynchronously, from a copy in the order [tap][k][m] that
// pack_weight_kernel makes at each call: 9 C_in C_out elements, and then any layout and any number
// of channels can be copied 16 bytes at a time; in 16 bits and channels_last so can the input, or
// by 8. Sums pass through shared memory, so that skip, activation and the store run along memory,
// whatever the layout, by runs of 16 or 8 bytes where alignment allows (one by one with gelu and
// silu).
//
// Floor, per pixel, e bytes an element: e (C_in + C_out) bytes (+ e C_out for skip), 18 C_in C_out
// FLOP, no exponentials but silu's, C_out. Here the input is read 1.27 times (the halo) for every
// 64 output channels, all weights once a block; channels are padded to 64 out, in 16 bits to
// multiples of 16 in.
// Measured fraction: unmeasured, never run on a GPU.
#pragma once

#include "common/pixel_tile.cuh"

namespace sr_kernels {

constexpr int kTapCount = 9;

// packed[((block 9) + tap) k_total + k][m], m < 64: the weight of output channel 64 block + m; zero
// where there is no such channel, or no input channel k. A thread for each of `count` elements.
template <typename E>
__global__ void __launch_bounds__(kBlockThreads)
    pack_weight_kernel(FeatureMap weight, int c_out, int c_in, int k_total, int64_t count,
                       E* packed) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t row = i / kProductRows, block = row / k_total / kTapCount;
  const int64_t m = block * kProductRows + i % kProductRows, k = row % k_total;
  const int tap = static_cast<int>(row / k_total % kTapCount);
  E value = from_float<E>(0.0f);
  if (m < c_out && k < c_in) value = load_element<E>(weight, m, k, tap / 3, tap % 3);
  store_global<E>(packed + i, value);
}

struct Conv3x3KernelParams {
  ImageSize size;
  int c_in, c_out, k_total;
  FeatureMap x, skip, y;             // skip.data nullptr: absent
  const void *packed_weight, *bias;  // bias nullptr: absent
  Activation activation;
  float slope;
};

template <typename E>
struct Conv3x3Tile {
  static constexpr bool kTensorCores = sizeof(E) == 2;
  static constexpr int kEdge = 16, kPixels = kEdge * kEdge;
  static constexpr int kHaloEdge = kEdge + 2, kHaloPixels = kHaloEdge * kHaloEdge;
  static constexpr int kK = kTensorCores ? 64 : 16;  // input channels of a slice
  static constexpr int kStepK = kTensorCores ? 16 : 1;
  static constexpr int kTaps = kTensorCores ? 1 : 3;  // of a buffer of weights
  static constexpr int kParts = kTapCount / kTaps, kBuffers = 3;
  static constexpr int kLdW = kProductRows + (kTensorCores ? 8 : 0);
  static constexpr int kBufferElements = kTaps * kK * kLdW;
  // 16 bit: elements from a pixel to the next. float32: from a row of pixels, from a channel.
  static constexpr int kLdPixel = kK + 8;
  static constexpr int kLdRow = kHaloEdge + 2, kLdChannel = kHaloEdge * kLdRow + 2;
  static constexpr int kInputElements = kTensorCores ? kHaloPixels * kLdPixel : kK * kLdChannel;
  static constexpr int kInputAt = kBuffers * kBufferElements * static_cast<int>(sizeof(E));
  static constexpr int kOperandBytes = kInputAt + kInputElements * static_cast<int>(sizeof(E));
  using Stage = SumStage<kPixels>;
  using Inner = RectanglePixels<kEdge, kEdge, 0>;
  static constexpr int kSharedBytes = kOperandBytes > Stage::kBytes ? kOperandBytes : Stage::kBytes;
  static_assert(kSharedBytes <= kMaxSharedBytes, "starts on every GPU");
  static SR_HOST_DEVICE int padded(int channels) {
    return (channels + kStepK - 1) / kStepK * kStepK;
  }
};

// The block's sums, += the products with the taps of one buffer of weights; which element is whose
// is TileProduct's, pixel 16 h + w.
template <typename E>
struct Conv3x3Product : TileProduct<E, Conv3x3Tile<E>::kPixels> {
  using Tile = Conv3x3Tile<E>;
  SR_DEVICE void accumulate_taps(const E* weight, const E* input, int tap, int k_count,
                                 int thread) {
    const int lane = thread % 32, warp = thread / 32;
    constexpr int kRows = TileProduct<E, Tile::kPixels>::kPairs;  // of the tile: a pair is a row
    weight += warp % 2 * 32;
    input += ((warp / 2 * kRows + tap / 3) * Tile::kHaloEdge + tap % 3) * Tile::kLdPixel;
#pragma unroll 1
    for (int k = 0; k < k_count; k += Tile::kStepK) {
      FragmentA left[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        load_a_from_rows_k(left[i], weight + k * Tile::kLdW + 16 * i, Tile::kLdW, lane);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        FragmentB right[2];
        load_b_from_rows_n(right, input + row * Tile::kHaloEdge * Tile::kLdPixel + k,
                           Tile::kLdPixel, lane);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = 0; j < 2; ++j) multiply_add<E>(this->sum[i][2 * row + j], left[i], right[j]);
      }
    }
  }
};

template <>
struct Conv3x3Product<float> : TileProduct<float, Conv3x3Tile<float>::kPixels> {
  using Tile = Conv3x3Tile<float>;
  SR_DEVICE void accumulate_taps(const float* weight, const float* input, int tap, int k_count,
                                 int thread) {
    const int lane = thread % 32;
    weight += thread / 32 * 8;
    input += (lane / 8 + tap / 3) * Tile::kLdRow + lane % 8 * 2;
#pragma unroll 1
    for (int k = 0; k < k_count; ++k) {
      float x[kPairs][4];  // two pixels and their neighbours
#pragma unroll
      for (int j = 0; j < kPairs; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const auto pair = load_shared<Vector<float, 2>>(input + k * Tile::kLdChannel +
                                                          4 * j * Tile::kLdRow + 2 * half);
          x[j][2 * half] = pair.element[0];
          x[j][2 * half + 1] = pair.element[1];
        }
#pragma unroll
      for (int s = 0; s < Tile::kTaps; ++s) {
        Vector<float, 4> left[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
          left[i] = load_shared<Vector<float, 4>>(weight + (s * Tile::kK + k) * Tile::kLdW + 4 * i);
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
          for (int j = 0; j < kPairs; ++j) {
            sum[i][j][0] += left[i / 4].element[i % 4] * x[j][s];
            sum[i][j][1] += left[i / 4].element[i % 4] * x[j][s + 1];
          }
      }
    }
  }
};

// Channels k0 ... of the tile with its halo, whose first pixel is (n, h0, w0); zero outside of the
// image, and up to a whole step of the product. The caller commits and waits.
template <typename E>
SR_DEVICE void load_halo(E* input, const Conv3x3KernelParams& p, int64_t n, int h0, int w0, int k0,
                         int thread) {
  using Tile = Conv3x3Tile<E>;
  const int k_count = p.c_in - k0 < Tile::kK ? p.c_in - k0 : Tile::kK;
  const int k_padded = Tile::padded(k_count);
  const bool channels_last = p.x.stride_c == 1;
  const auto for_each = [&](auto width, const auto& function) {  // of `width` channels
    constexpr int kRuns = Tile::kK / width;
#pragma unroll 4
    for (int i = thread; i < Tile::kHaloPixels * kRuns; i += kBlockThreads) {
      const int pixel = channels_last ? i / kRuns : i % Tile::kHaloPixels;
      const int k = (channels_last ? i % kRuns : i / Tile::kHaloPixels) * width;
      if (k >= k_padded) continue;
      const int h = h0 + pixel / Tile::kHaloEdge, w = w0 + pixel % Tile::kHaloEdge;
      const bool there = p.size.has(h, w);
      const E* from = static_cast<const E*>(p.x.data);
      if (there) from += element_offset(p.x, n, k0 + k, h, w);
      function(pixel, k, there ? k_count - k : 0, from);
    }
  };
  if constexpr (!Tile::kTensorCores) {
    for_each(std::integral_constant<int, 1>{}, [&](int pixel, int k, int count, const E* from) {
      copy_async<4>(input + k * Tile::kLdChannel + pixel / Tile::kHaloEdge * Tile::kLdRow +
                        pixel % Tile::kHaloEdge,
                    from, count > 0);
    });
  } else {
    with_access_width<E>(run_places<E>(p.x, true) | p.c_in, [&](auto width) {
      constexpr int kRun = width;
      if constexpr (kRun > 1) {
        for_each(width, [&](int pixel, int k, int count, const E* from) {
          copy_async<kRun* static_cast<int>(sizeof(E))>(input + pixel * Tile::kLdPixel + k, from,
                                                        count > 0);
        });
      } else {
        for_each(std::integral_constant<int, 2>{}, [&](int pixel, int k, int count, const E* from) {
          Vector<E, 2> pair{{from_float<E>(0.0f), from_float<E>(0.0f)}};
          if (count > 0) pair.element[0] = load_global<E>(from);
          if (count > 1) pair.element[1] = load_global<E>(from + p.x.stride_c);
          store_shared(input + pixel * Tile::kLdPixel + k, pair);
        });
      }
    });
  }
}

// Grid: tiles, 64 output channels each in y.
template <typename E>
__global__ void __launch_bounds__(kBlockThreads, sizeof(E) == 2 ? 2 : 1)
    conv3x3_kernel(Conv3x3KernelParams p) {
  using Tile = Conv3x3Tile<E>;
  const int thread = static_cast<int>(threadIdx.x);
  const unsigned tiles_w = (p.size.width + Tile::kEdge - 1) / Tile::kEdge;
  const unsigned tiles_h = (p.size.height + Tile::kEdge - 1) / Tile::kEdge;
  const int w0 = static_cast<int>(blockIdx.x % tiles_w) * Tile::kEdge;
  const int h0 = static_cast<int>(blockIdx.x / tiles_w % tiles_h) * Tile::kEdge;
  const int64_t n = blockIdx.x / tiles_w / tiles_h;
  const int m0 = static_cast<int>(blockIdx.y) * kProductRows;
  E* weights = shared_array<E>(0, Tile::kBuffers * Tile::kBufferElements);
  E* input = shared_array<E>(Tile::kInputAt, Tile::kInputElements);

  const int steps = (p.c_in + Tile::kK - 1) / Tile::kK * Tile::kParts;
  const E* packed = static_cast<const E*>(p.packed_weight) +
                    static_cast<int64_t>(blockIdx.y) * kTapCount * p.k_total * kProductRows;
  const auto rows_from = [&](int k0) {
    return p.k_total - k0 < Tile::kK ? p.k_total - k0 : Tile::kK;
  };
  const auto copy_weights = [&](int step) {
    const int k0 = step / Tile::kParts * Tile::kK, tap = step % Tile::kParts * Tile::kTaps;
    E* buffer = weights + step % Tile::kBuffers * Tile::kBufferElements;
    constexpr int kRun = 16 / static_cast<int>(sizeof(E)), kRuns = kProductRows / kRun;
    for (int t = 0; t < Tile::kTaps; ++t) {
      const E* from = packed + (static_cast<int64_t>(tap + t) * p.k_total + k0) * kProductRows;
      for (int i = thread; i < rows_from(k0) * kRuns; i += kBlockThreads)
        copy_async<16>(buffer + (t * Tile::kK + i / kRuns) * Tile::kLdW + i % kRuns * kRun,
                       from + i * kRun, true);
    }
  };

  Conv3x3Product<E> product;
  copy_weights(0);
  copy_async_commit();
  copy_weights(1);
  copy_async_commit();
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int k0 = step / Tile::kParts * Tile::kK, part = step % Tile::kParts;
    if (part == 0) {
      if (step > 0) __syncthreads();  // the slice before has been used
      load_halo<E>(input, p, n, h0 - 1, w0 - 1, k0, thread);
      copy_async_commit();
      copy_async_wait<0>();
    } else {
      copy_async_wait<1>();
    }
    __syncthreads();  // these weights are there, those of the step before have been used
    if (step + 2 < steps) copy_weights(step + 2);
    copy_async_commit();
    const E* buffer = weights + step % Tile::kBuffers * Tile::kBufferElements;
    if constexpr (Tile::kTensorCores) {
      product.accumulate_taps(buffer, input, part, rows_from(k0), thread);
    } else {  // sums of sums: one long sum would cost digits that stock's blocks keep
      Conv3x3Product<E> of_part;
      of_part.accumulate_taps(buffer, input, part * Tile::kTaps, rows_from(k0), thread);
      product.add(of_part);
    }
  }
  copy_async_wait<0>();  // nothing: the last groups were empty
  __syncthreads();

  const int m_count = p.c_out - m0 < kProductRows ? p.c_out - m0 : kProductRows;
  const typename Tile::Stage stage(p.y);
  stage.put(product, p.bias == nullptr ? nullptr : static_cast<const E*>(p.bias) + m0, m_count,
            thread);
  __syncthreads();
  const typename Tile::Inner pixels{p.size, n, h0, w0};
  uint64_t places = run_places<E>(p.y, stage.by_pixel) | run_places<E>(p.skip, stage.by_pixel);
  if (!fits_in_epilogue(p.activation)) places |= 1;
  stage.template visit<E>(
      places, pixels, p.size.width, m_count, thread, [&](const Pixel& at, int c, int, auto& value) {
        constexpr int kRun = static_cast<int>(sizeof(value) / sizeof(float));
        if (p.skip.data != nullptr) add_run<E>(value, p.skip, at, m0 + c);
#pragma unroll
        for (int i = 0; i < kRun; ++i)
          value[i] = kRun == 1 ? activate(p.activation, value[i], p.slope)
                               : activate_in_epilogue(p.activation, p.slope, value[i]);
        put_run<E>(value, p.y, at, m0 + c);
      });
}

}  // namespace sr_kernels
