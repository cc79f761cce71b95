// Attention gates on CUDA, forward.
//
//   pixel_attention    y = x sigmoid(W x + b)                                  pixel_gate_kernel
//   spatial_attention  y = u sigmoid(conv_k([max_c u, mean_c u]) + b), u = x   spatial_*_kernel
//   pixel_spatial      the same with u = x sigmoid(W x + b); pixel_gate_kernel leaves u in y and
//                      both statistics, so that x is read once
//   channel_gate       gate = sigmoid(W_up relu(W_down z + b_down) + b_up)     moments_kernel, then
//   channel_attention  y = x gate                   channel_gate_kernel or channel_scale_kernel
//   gated_conv1x1      y = W (gate x) + b (+ residual)                         gated_conv_kernel
//
// Tile: products take 64 output channels and 128 consecutive pixels at a time, on tensor cores (16
// bit) or by FFMA (float32, no TF32); the sums pass through shared memory, so that the sigmoid and
// the store run along memory in either layout. A gated convolution's pixels are of one image: its
// gate is multiplied into the weight tile. The spatial kernels have a thread for each pixel, which
// goes over its channels. z needs the mean of every channel: blocks of 8 channels and a share of
// the pixels leave (count, mean, sum of squared deviations), which the next kernel merges in order
// (Chan et al., 1979): no difference of large sums, no atomics, the same bits every time. Every
// block of channel_scale_kernel merges them, and finds its image's gates, for itself, so that y
// takes two launches; then it multiplies all channels of its share of the pixels by runs of 16 or 8
// bytes.
//
// Floor, per pixel, C channels, e bytes an element: 2 e C bytes and 2 C C FLOP (pixel: also C
// exponentials and divisions); spatial 2 e C bytes, of which y is written and read once more here;
// channel attention 2 e C bytes where the feature map stays on chip, across all blocks, between its
// statistics and its product, else 3 e C. Here it is always 3 e C, of which the second-level cache
// may serve the second reading: one launch would need a barrier of the whole grid. Gated
// convolution e (C_in + C_out) bytes (+ e C_out), 2 C_in C_out FLOP. Measured fraction: unmeasured,
// never run on a GPU.
#pragma once

#include "attention_gates/params.h"
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "shift_conv/forward.cuh"

namespace sr_kernels {

SR_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// ------------------------------------------------------------------ pixel attention

// s = sigmoid(W x + b). Forward: out = x s, and its maximum and mean over channels where wanted.
// Backward, with grad given: out = grad s and dz = grad x s (1 - s).
struct PixelGateParams {
  ImageSize size;
  int channels;
  FeatureMap x, grad;
  const void *weight, *bias;
  FeatureMap out, dz;
  float *maximum, *mean;  // (N, H, W) dense, or nullptr
};

template <typename E>
__global__ void __launch_bounds__(kBlockThreads, 1) pixel_gate_kernel(PixelGateParams p) {
  using Tile = ConvTile<E>;
  constexpr int kPixels = Tile::kPixels, kK = Tile::kK;
  const int thread = static_cast<int>(threadIdx.x);
  const PixelRun pixels(p.size, static_cast<int64_t>(blockIdx.x) * kPixels);
  E* weight = shared_array<E>(0, kProductRows * Tile::kLdW);
  const typename Tile::Input input(Tile::kInputAt, kK, p.x);
  const typename Tile::Stage stage(p.x);
  const uint64_t places =
      run_places<E>(p.x, stage.by_pixel) | run_places<E>(p.grad, stage.by_pixel) |
      run_places<E>(p.out, stage.by_pixel) | run_places<E>(p.dz, stage.by_pixel);
  float maximum = kMinusInfinity, sum = 0.0f;  // of this thread's pixel

#pragma unroll 1
  for (int m0 = 0; m0 < p.channels; m0 += kProductRows) {
    const int m_count = p.channels - m0 < kProductRows ? p.channels - m0 : kProductRows;
    typename Tile::Product product;
#pragma unroll 1
    for (int k0 = 0; k0 < p.channels; k0 += kK) {
      const int k_count = p.channels - k0 < kK ? p.channels - k0 : kK;
      const int k_padded = round_up(k_count, kStepOfK<E>);
      __syncthreads();
      load_weights<E, kK>(
          weight, Tile::kLdW, k_padded,
          static_cast<const E*>(p.weight) + static_cast<int64_t>(m0) * p.channels + k0, p.channels,
          1, m_count, k_count, thread);
      input.load(k_padded, p.x, p.size, pixels, Shift(), k0, k_count, thread);
      finish_copies();
      input.accumulate(product, weight, Tile::kLdW, 0, k_padded, thread);
    }
    __syncthreads();
    stage.put(product, p.bias == nullptr ? nullptr : static_cast<const E*>(p.bias) + m0, m_count,
              thread);
    __syncthreads();
    stage.template visit<E>(
        places, pixels, p.size.width, m_count, thread,
        [&](const Pixel& at, int c, int i, auto& value) {
          constexpr int kRun = static_cast<int>(sizeof(value) / sizeof(float));
          const int m = m0 + c;
          const auto x = load_run<E, kRun>(p.x, at, m);
#pragma unroll
          for (int r = 0; r < kRun; ++r) value[r] = sigmoid(value[r]);
          if (p.grad.data != nullptr) {
            const auto grad = load_run<E, kRun>(p.grad, at, m);
            float dz[kRun];
#pragma unroll
            for (int r = 0; r < kRun; ++r) {
              const float g = to_float(grad.element[r]), s = value[r];
              dz[r] = g * to_float(x.element[r]) * s * (1.0f - s);
              value[r] = g * s;
            }
            put_run<E>(dz, p.dz, at, m);
            if (p.out.data != nullptr) put_run<E>(value, p.out, at, m);
          } else {
#pragma unroll
            for (int r = 0; r < kRun; ++r) {  // the statistics are those of what is stored
              value[r] = to_float(from_float<E>(to_float(x.element[r]) * value[r]));
              if (p.maximum != nullptr) store_shared<float>(stage.at(c, i) + r, value[r]);
            }
            put_run<E>(value, p.out, at, m);
          }
        });
    if (p.maximum == nullptr) continue;
    __syncthreads();
    if (thread < kPixels && pixels[thread].exists) {
      float part = 0.0f;
      for (int c = 0; c < m_count; ++c) {
        const float u = load_shared<float>(stage.at(c, thread));
        maximum = u > maximum || u != u ? u : maximum;  // NaN passes
        part += u;
      }
      sum += part;
    }
  }
  if (p.maximum != nullptr && thread < kPixels && pixels[thread].exists) {
    store_global<float>(p.maximum + pixels.first + thread, maximum);
    store_global<float>(p.mean + pixels.first + thread, sum / static_cast<float>(p.channels));
  }
}

// ------------------------------------------------------------------ spatial attention

struct SpatialParams {
  ImageSize size;
  int channels, kernel;
  FeatureMap u;
  const void *weight, *bias;  // (2, kernel, kernel), (1)
  FeatureMap out;
  float *maximum, *mean;  // of u over channels, (N, H, W) dense

  // Backward: the gradient of out; t and d = (sum_c grad u) t (1 - t), (N, H, W) dense.
  FeatureMap grad;
  float *gate, *d;
  float* taps;  // (slices, 2 kernel kernel + 1), sums for the weight's gradient and the bias's
  int slices;
};

// The pixel of a kernel with a thread for each.
SR_DEVICE int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
}

template <typename E>
__global__ void __launch_bounds__(kBlockThreads) spatial_statistics_kernel(SpatialParams p) {
  const PixelRun pixel(p.size, thread_index());
  const Pixel at = pixel[0];
  if (!at.exists) return;
  float maximum = kMinusInfinity, sum = 0.0f;
#pragma unroll 4
  for (int c = 0; c < p.channels; ++c) {
    const float u = to_float(load_element<E>(p.u, at.n, c, at.h, at.w));
    maximum = u > maximum || u != u ? u : maximum;
    sum += u;
  }
  store_global<float>(p.maximum + pixel.first, maximum);
  store_global<float>(p.mean + pixel.first, sum / static_cast<float>(p.channels));
}

// sigmoid(conv([maximum, mean]) + b) at a pixel.
template <typename E>
SR_DEVICE float spatial_gate(const SpatialParams& p, const Pixel& at) {
  const E* weight = static_cast<const E*>(p.weight);
  const int radius = p.kernel / 2;
  float z = p.bias == nullptr ? 0.0f : to_float(load_global<E>(static_cast<const E*>(p.bias)));
#pragma unroll 1
  for (int plane = 0; plane < 2; ++plane)
#pragma unroll 1
    for (int i = 0; i < p.kernel; ++i)
#pragma unroll 1
      for (int j = 0; j < p.kernel; ++j, ++weight) {
        const int h = at.h + i - radius, w = at.w + j - radius;
        if (!p.size.has(h, w)) continue;
        const float* from = plane == 0 ? p.maximum : p.mean;
        z += to_float(load_global<E>(weight)) *
             load_global<float>(from + (at.n * p.size.height + h) * p.size.width + w);
      }
  return sigmoid(z);
}

// out = u t; u and out may be the same map.
template <typename E>
__global__ void __launch_bounds__(kBlockThreads) spatial_scale_kernel(SpatialParams p) {
  const Pixel at = PixelRun(p.size, thread_index())[0];
  if (!at.exists) return;
  const float gate = spatial_gate<E>(p, at);
#pragma unroll 4
  for (int c = 0; c < p.channels; ++c) {
    const float u = to_float(load_element<E>(p.u, at.n, c, at.h, at.w));
    store_element(p.out, at.n, c, at.h, at.w, from_float<E>(u * gate));
  }
}

// ------------------------------------------------------------------ channel attention

// Count, mean and sum of squared deviations of some values, and the sum of their products with a
// gradient.
struct alignas(16) Moments {
  float count, mean, squares, dot;
};
SR_DEVICE Moments merge(const Moments& a, const Moments& b) {
  if (b.count == 0.0f) return a;
  const float count = a.count + b.count, difference = b.mean - a.mean, share = b.count / count;
  // The weighted form of the mean: infinity passes.
  return {count, a.mean * (a.count / count) + b.mean * share,
          a.squares + b.squares + difference * difference * a.count * share, a.dot + b.dot};
}

struct ChannelParams {
  int64_t batch;
  int height, width, channels, hidden;
  bool contrast;
  FeatureMap x, grad, out;
  const void *w_down, *b_down, *w_up, *b_up;
  void* gate_out;  // (N, C)
  int chunks;      // of an image's pixels
  Moments* parts;  // (N, C, chunks)
  int share;       // of an image's pixels, which a block of channel_scale_kernel takes
  // Backward. gate, (N, C), as below. gate_grad: (N, C) of the gate itself, else it comes from
  // `parts`. What follows from it, for every image: z, the hidden values, and the gradients of what
  // enters sigmoid and relu; dx = grad gate + offset + slope (x - mean).
  const void* gate_grad;
  int64_t gate_grad_stride_n, gate_grad_stride_c;
  float *gate, *z, *up, *mean, *offset, *slope;  // (N, C) each
  float *hidden_values, *down;                   // (N, hidden)
  void *dw_down, *db_down, *dw_up, *db_up;
};

// Grid: chunks of every image, channels / 8.
template <typename E>
__global__ void __launch_bounds__(kBlockThreads) moments_kernel(ChannelParams p) {
  constexpr int kRun = 8;  // values at a time: their mean first, then the deviations from it
  const int thread = static_cast<int>(threadIdx.x);
  const int c = static_cast<int>(blockIdx.y) * kWalkChannels + walk_channel(p.x, thread);
  const int64_t n = blockIdx.x / p.chunks, chunk = blockIdx.x % p.chunks;
  const int64_t pixels = static_cast<int64_t>(p.height) * p.width;
  const int64_t each = (pixels + p.chunks - 1) / p.chunks, first = chunk * each;
  const int64_t last = first + each < pixels ? first + each : pixels;
  Moments total{0.0f, 0.0f, 0.0f, 0.0f};
  const auto value = [&](const FeatureMap& map, int64_t i) {
    const int64_t h = i / p.width, w = i % p.width;
    return to_float(load_element<E>(map, n, c, h, w));
  };
#pragma unroll 1
  for (int64_t i = first + walk_pixel(p.x, thread); c < p.channels && i < last;
       i += kRun * kWalkPixels) {
    float x[kRun], sum = 0.0f, count = 0.0f, dot = 0.0f;
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const bool there = i + j * kWalkPixels < last;
      x[j] = there ? value(p.x, i + j * kWalkPixels) : 0.0f;
      sum += x[j];
      count += there ? 1.0f : 0.0f;
      if (there && p.grad.data != nullptr) dot += x[j] * value(p.grad, i + j * kWalkPixels);
    }
    Moments run{count, sum / count, 0.0f, dot};
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const float deviation = x[j] - run.mean;
      if (i + j * kWalkPixels < last) run.squares += deviation * deviation;
    }
    total = merge(total, run);
  }
  Moments* shared = shared_array<Moments>(0, kBlockThreads);
  store_shared(shared + walk_channel(p.x, thread) * kWalkPixels + walk_pixel(p.x, thread), total);
  __syncthreads();
  const int channel = static_cast<int>(blockIdx.y) * kWalkChannels + thread;
  if (thread >= kWalkChannels || channel >= p.channels) return;
  total = load_shared<Moments>(shared + thread * kWalkPixels);
  for (int i = 1; i < kWalkPixels; ++i)
    total = merge(total, load_shared<Moments>(shared + thread * kWalkPixels + i));
  store_global(p.parts + (n * p.channels + channel) * p.chunks + chunk, total);
}

template <typename E>
SR_DEVICE float parameter(const void* array, int64_t i) {
  return array == nullptr ? 0.0f : to_float(load_global<E>(static_cast<const E*>(array) + i));
}

// What a block finds out about its image: z and hidden values in shared memory, the rest returned
// by channel.
template <typename E>
struct ChannelGate {
  const ChannelParams& p;
  int64_t n;
  float *z, *hidden;  // shared

  SR_DEVICE Moments moments(int c) const {
    const Moments* parts = p.parts + (n * p.channels + c) * p.chunks;
    Moments total = load_global<Moments>(parts);
    for (int i = 1; i < p.chunks; ++i) total = merge(total, load_global<Moments>(parts + i));
    return total;
  }
  // As the definition has it, 0 where the variance is NaN (next to an infinite value).
  static SR_DEVICE float deviation(const Moments& m) {
    return m.squares > 0.0f ? sqrtf(m.squares / m.count) : 0.0f;
  }

  // All threads; z and hidden are there afterwards.
  SR_DEVICE void find(int thread) const {
    for (int c = thread; c < p.channels; c += kBlockThreads) {
      const Moments m = moments(c);
      store_shared<float>(z + c, m.mean + (p.contrast ? deviation(m) : 0.0f));
    }
    __syncthreads();
    for (int r = thread / 32; r < p.hidden; r += kBlockThreads / 32) {
      float sum = 0.0f;
      for (int c = thread % 32; c < p.channels; c += 32)
        sum += parameter<E>(p.w_down, static_cast<int64_t>(r) * p.channels + c) *
               load_shared<float>(z + c);
      sum = warp_sum(sum) + parameter<E>(p.b_down, r);
      if (thread % 32 == 0) store_shared<float>(hidden + r, sum < 0.0f ? 0.0f : sum);
    }
    __syncthreads();
  }
  SR_DEVICE float operator()(int c) const {
    float sum = parameter<E>(p.b_up, c);
    for (int r = 0; r < p.hidden; ++r)
      sum += parameter<E>(p.w_up, static_cast<int64_t>(c) * p.hidden + r) *
             load_shared<float>(hidden + r);
    return sigmoid(sum);
  }
};

// One block an image.
template <typename E>
__global__ void __launch_bounds__(kBlockThreads) channel_gate_kernel(ChannelParams p) {
  const int thread = static_cast<int>(threadIdx.x);
  float* z = shared_array<float>(0, p.channels + p.hidden);
  const ChannelGate<E> gate{p, static_cast<int64_t>(blockIdx.x), z, z + p.channels};
  gate.find(thread);
  for (int c = thread; c < p.channels; c += kBlockThreads)
    store_global<E>(static_cast<E*>(p.gate_out) + gate.n * p.channels + c, from_float<E>(gate(c)));
}

// out = x gate. Grid: shares of every image's pixels.
template <typename E>
__global__ void __launch_bounds__(kBlockThreads) channel_scale_kernel(ChannelParams p) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t image = static_cast<int64_t>(p.height) * p.width;
  const int64_t shares = (image + p.share - 1) / p.share, n = blockIdx.x / shares;
  const ImageSize size{n + 1, p.height, p.width};  // a share ends where its image does
  const PixelRun pixels(size, n * image + blockIdx.x % shares * p.share);
  float* gates = shared_array<float>(0, p.channels + p.hidden);
  const ChannelGate<E> gate{p, n, gates, gates + p.channels};
  gate.find(thread);
  for (int c = thread; c < p.channels; c += kBlockThreads)  // z has been used
    store_shared<float>(gates + c, gate(c));
  __syncthreads();

  const bool by_pixel = p.x.stride_c == 1;
  const uint64_t places = run_places<E>(p.x, by_pixel) | run_places<E>(p.out, by_pixel) |
                          static_cast<uint64_t>(by_pixel ? p.channels : p.width);
  with_access_width<E>(places, [&](auto constant) {
    constexpr int kRun = constant;
    const auto scale = [&](const Pixel& at, int c) {
      const auto x = load_run<E, kRun>(p.x, at, c);
      float y[kRun];
#pragma unroll
      for (int i = 0; i < kRun; ++i)
        y[i] = to_float(x.element[i]) * load_shared<float>(gates + c + (by_pixel ? i : 0));
      put_run<E>(y, p.out, at, c);
    };
    if (by_pixel) {
      for (int i = thread / kWalkChannels; i < p.share; i += kWalkPixels) {
        const Pixel at = pixels[i];
        if (!at.exists) break;
#pragma unroll 2
        for (int c = thread % kWalkChannels * kRun; c < p.channels; c += kWalkChannels * kRun)
          scale(at, c);
      }
    } else {
      for (int i = thread % 32 * kRun; i < p.share; i += 32 * kRun) {
        const Pixel at = pixels[i];
        if (!at.exists) break;
#pragma unroll 2
        for (int c = thread / 32; c < p.channels; c += kBlockThreads / 32) scale(at, c);
      }
    }
  });
}

// ------------------------------------------------------------------ gated convolution

// out = W' x + b (+ residual) with W'[m][k] = W[m][k] times the gate of channel k, or of channel m
// where gate_of_output: the gradient of x.
struct GatedParams {
  int64_t batch;
  int height, width, k_count, m_count;
  FeatureMap x, residual, out;
  const void *gate, *weight, *bias;
  bool gate_of_output;
  int64_t weight_stride_m, weight_stride_k;
};

template <typename E>
__global__ void __launch_bounds__(kBlockThreads) gated_conv_kernel(GatedParams p) {
  using Tile = ConvTile<E>;
  constexpr int kPixels = Tile::kPixels, kK = Tile::kK;
  const int thread = static_cast<int>(threadIdx.x);
  const int m0 = static_cast<int>(blockIdx.y) * kProductRows;
  const int m_count = p.m_count - m0 < kProductRows ? p.m_count - m0 : kProductRows;
  const int64_t image = static_cast<int64_t>(p.height) * p.width;
  const int64_t tiles = (image + kPixels - 1) / kPixels, n = blockIdx.x / tiles;
  const ImageSize size{n + 1, p.height, p.width};  // a tile ends where its image does
  const PixelRun pixels(size, n * image + blockIdx.x % tiles * kPixels);
  const int gates = p.gate_of_output ? p.m_count : p.k_count;
  const E* gate = static_cast<const E*>(p.gate) + n * gates;
  E* weight = shared_array<E>(0, kProductRows * Tile::kLdW);
  const typename Tile::Input input(Tile::kInputAt, kK, p.x);

  typename Tile::Product product;
#pragma unroll 1
  for (int k0 = 0; k0 < p.k_count; k0 += kK) {
    const int k_count = p.k_count - k0 < kK ? p.k_count - k0 : kK;
    const int k_padded = round_up(k_count, kStepOfK<E>);
    if (k0 > 0) __syncthreads();
    const bool along_k = p.weight_stride_k == 1;
#pragma unroll 4
    for (int i = thread; i < kProductRows * kK; i += kBlockThreads) {
      const int m = along_k ? i / kK : i % kProductRows, k = along_k ? i % kK : i / kProductRows;
      if (k >= k_padded) continue;
      float value = 0.0f;
      if (m < m_count && k < k_count)
        value =
            to_float(load_global<E>(static_cast<const E*>(p.weight) + (m0 + m) * p.weight_stride_m +
                                    (k0 + k) * p.weight_stride_k)) *
            to_float(load_global<E>(gate + (p.gate_of_output ? m0 + m : k0 + k)));
      store_shared(weight + m * Tile::kLdW + k, from_float<E>(value));
    }
    input.load(k_padded, p.x, size, pixels, Shift(), k0, k_count, thread);
    finish_copies();
    input.accumulate(product, weight, Tile::kLdW, 0, k_padded, thread);
  }
  __syncthreads();
  const typename Tile::Stage stage(p.out);
  stage.put(product, p.bias == nullptr ? nullptr : static_cast<const E*>(p.bias) + m0, m_count,
            thread);
  __syncthreads();
  const uint64_t places =
      run_places<E>(p.out, stage.by_pixel) | run_places<E>(p.residual, stage.by_pixel);
  stage.template visit<E>(places, pixels, p.width, m_count, thread,
                          [&](const Pixel& at, int c, int, auto& value) {
                            if (p.residual.data != nullptr)
                              add_run<E>(value, p.residual, at, m0 + c);
                            put_run<E>(value, p.out, at, m0 + c);
                          });
}

}  // namespace sr_kernels
