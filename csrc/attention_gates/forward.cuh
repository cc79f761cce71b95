// Attention gates on CUDA, forward.
//
//   pixel_attention    y = x sigmoid(W x + b)                                  pixel_gate_kernel
//   spatial_attention  y = u sigmoid(conv_k([max_c u, mean_c u]) + b), u = x
//                                              spatial_statistics_kernel, then spatial_scale_kernel
//   pixel_spatial      the same with u = x sigmoid(W x + b); pixel_gate_kernel leaves u in y and
//                      both statistics, so that x is read once
//   channel_gate       gate = sigmoid(W_up relu(W_down z + b_down) + b_up)     moments_kernel, then
//                                                                              channel_gate_kernel
//   channel_attention  y = x gate               channel_attention_kernel where maps stay on chip,
//                                               else moments_kernel and channel_scale_kernel
//   gated_conv1x1      y = W (gate x) + b (+ residual)                         gated_conv_kernel
//
// Tile: products take 64 output channels and 128 consecutive pixels at a time, on tensor cores (16
// bit) or by FFMA (float32, no TF32); the sums pass through shared memory, so that the sigmoid and
// the store run along memory in either layout. A gated convolution's pixels are of one image: its
// gate is multiplied into the weight tile. The spatial kernels have a thread for each pixel, which
// goes over its channels. z needs the mean of every channel: blocks leave (count, mean, sum of
// squared deviations) of their pixels, which are merged in order (Chan et al., 1979): no difference
// of large sums, no atomics, the same bits every time.
//
// Channel attention is one launch where shares of all images fit the shared memory of all blocks
// that the GPU holds at once (on_chip_shares, below; 99 KiB a block at most): a block of
// channel_attention_kernel keeps its share, and once it has left its moments and waited for all
// others a warp merges those of a channel, then, past a second barrier, every block finds its
// image's gates and multiplies what it kept. Otherwise, or where the driver refuses that, it is
// two: blocks of 8 channels and a chunk of the pixels leave moments, every block of
// channel_scale_kernel merges them and finds its image's gates for itself, and it multiplies all
// channels of its share of the pixels by runs of 16 or 8 bytes.
//
// Floor, per pixel, C channels, e bytes an element, k x k taps:
//   pixel          2 e C bytes, 2 C C + C FLOP, C exponentials. Here x is read twice, for the
//                  product (again for every 64 output channels) and for the gate
//   spatial        2 e C bytes, 3 C + 4 k k FLOP, one exponential. Here x is read twice; 16 bytes
//                  more for the statistics, written and read; their k k neighbours from the caches
//   pixel_spatial  2 e C bytes, 2 C C + 4 C + 4 k k FLOP, C + 1 exponentials. Here 5 e C bytes: x
//                  twice, u written and read, y; the statistics as above
//   channel        2 e C bytes (gate alone: e C), 2 C FLOP (contrast: 5 C), C exponentials an
//                  image. One launch takes as many bytes, two 3 e C, of which the second-level
//                  cache may serve the second reading
//   gated          e (C_in + C_out) bytes (+ e C_out with a residual), 2 C_in C_out FLOP, no
//                  exponentials. Here x is read again for every 64 output channels
// Products are padded to 64 output channels and, in 16 bits, to a multiple of 16 input channels.
// Measured fraction: unmeasured, never run on a GPU.
#pragma once

#include "attention_gates/params.h"
#include "common/cooperative.cuh"
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
  int share;       // of an image's pixels, which a block takes that writes y
  float* z;        // (N, C), the statistic
  // Backward. gate, (N, C), as below. gate_grad: (N, C) of the gate itself, else it comes from
  // `parts`. What follows from it, for every image: the hidden values, and the gradients of what
  // enters sigmoid and relu; dx = grad gate + offset + slope (x - mean).
  const void* gate_grad;
  int64_t gate_grad_stride_n, gate_grad_stride_c;
  float *gate, *up, *mean, *offset, *slope;  // (N, C) each
  float *hidden_values, *down;               // (N, hidden)
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
    for (int c = thread; c < p.channels; c += kBlockThreads)
      store_shared<float>(z + c, statistic(moments(c)));
    find_hidden(thread);
  }
  SR_DEVICE float statistic(const Moments& m) const {
    return m.mean + (p.contrast ? deviation(m) : 0.0f);
  }
  // From a z that the threads store.
  SR_DEVICE void find_hidden(int thread) const {
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
  // Then the gates, in place of z.
  SR_DEVICE void find_gates(int thread) const {
    for (int c = thread; c < p.channels; c += kBlockThreads) store_shared<float>(z + c, (*this)(c));
    __syncthreads();
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

// function(at, i, c) for what a thread takes of `count` pixels and all channels: runs of kRun
// channels, where `by_pixel`, or pixels, from pixel `at`, the i-th, and channel c on.
template <int kRun, typename Function>
SR_DEVICE void visit_runs(bool by_pixel, const PixelRun& pixels, int count, int channels,
                          int thread, const Function& function) {
  if (by_pixel) {
    for (int i = thread / kWalkChannels; i < count; i += kWalkPixels) {
      const Pixel at = pixels[i];
      if (!at.exists) break;
#pragma unroll 2
      for (int c = thread % kWalkChannels * kRun; c < channels; c += kWalkChannels * kRun)
        function(at, i, c);
    }
  } else {
    for (int i = thread % 32 * kRun; i < count; i += 32 * kRun) {
      const Pixel at = pixels[i];
      if (!at.exists) break;
#pragma unroll 2
      for (int c = thread / 32; c < channels; c += kBlockThreads / 32) function(at, i, c);
    }
  }
}

// out = x gate for a run. gates: shared, by channel.
template <typename E, int kRun>
SR_DEVICE void scale_run(const ChannelParams& p, bool by_pixel, const float* gates, const Pixel& at,
                         int c, const Vector<E, kRun>& x) {
  float y[kRun];
#pragma unroll
  for (int i = 0; i < kRun; ++i)
    y[i] = to_float(x.element[i]) * load_shared<float>(gates + c + (by_pixel ? i : 0));
  put_run<E>(y, p.out, at, c);
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
  gate.find_gates(thread);
  const bool by_pixel = p.x.stride_c == 1;
  const uint64_t places = run_places<E>(p.x, by_pixel) | run_places<E>(p.out, by_pixel) |
                          static_cast<uint64_t>(by_pixel ? p.channels : p.width);
  with_access_width<E>(places, [&](auto constant) {
    constexpr int kRun = constant;
    visit_runs<kRun>(by_pixel, pixels, p.share, p.channels, thread,
                     [&](const Pixel& at, int, int c) {
                       scale_run<E, kRun>(p, by_pixel, gates, at, c, load_run<E, kRun>(p.x, at, c));
                     });
  });
}

// ------------------------------------------------------------------ channel attention on chip

// A block's shared memory: sums of threads, its image's z or gates and hidden values, then x.
SR_HOST_DEVICE int channel_sums_floats(int channels) {
  return round_up(channels > 4 * kBlockThreads ? channels : 4 * kBlockThreads, 4);
}
SR_HOST_DEVICE int channel_tile_offset(int channels, int hidden) {
  return 4 * (channel_sums_floats(channels) + round_up(channels + hidden, 4));
}

// Takes the fewest blocks a multiprocessor that can keep all of x: they leave the fewest moments to
// merge. resident(shared_bytes): blocks that a multiprocessor holds at once. multiprocessors: 0
// where blocks cannot wait for each other.
template <typename Resident>
OnChipShares on_chip_shares(int64_t batch, int64_t pixels, int channels, int hidden,
                            int element_bytes, int multiprocessors, const Resident& resident) {
  constexpr int64_t kLeastBytes = 8192;  // of x: more than the moments that a block leaves
  constexpr int64_t kStep = 32;          // pixels, a multiple of every run
  if (batch == 0 || pixels == 0 || channels == 0) return {};
  const int64_t pixel_bytes = static_cast<int64_t>(channels) * element_bytes;
  for (int64_t each = 1; each <= 2048 / kBlockThreads; ++each) {
    const int64_t blocks = each * multiprocessors / batch;  // of an image
    if (blocks == 0) continue;
    const int64_t even = (pixels - 1) / blocks + 1, least = (kLeastBytes - 1) / pixel_bytes + 1;
    const int64_t share = ((even > least ? even : least) - 1) / kStep * kStep + kStep;
    if (share > kMaxSharedBytes) continue;
    const int64_t bytes = channel_tile_offset(channels, hidden) + share * pixel_bytes;
    if (bytes <= kMaxSharedBytes && resident(static_cast<int>(bytes)) >= each)
      return {static_cast<int>((pixels - 1) / share + 1), static_cast<int>(share),
              static_cast<int>(bytes)};
  }
  return {};
}

// A share of an image in shared memory, in the order of the feature map.
template <typename E>
struct ChannelTile {
  E* data;
  bool by_pixel;  // [pixel][channel], else [channel][pixel]
  int stride;     // of the first of these
  int pixels, channels;

  SR_DEVICE E* at(int i, int c) const {
    return data + (by_pixel ? i * stride + c : c * stride + i);
  }

  // store(c, sum) of every channel's values or, where kSquares, of their squared deviations from
  // means[c], by some thread. In an order that sizes and layout alone decide: not the alignment of
  // the feature map. sums: channel_sums_floats(channels) shared floats, free afterwards.
  template <bool kSquares, typename Store>
  SR_DEVICE void sum(const float* means, float* sums, int thread, const Store& store) const {
    if ((by_pixel ? channels : pixels) % 4 == 0)
      sum_runs<4, kSquares>(means, sums, thread, store);
    else
      sum_runs<1, kSquares>(means, sums, thread, store);
    __syncthreads();
  }

 private:
  template <int kRun, bool kSquares, typename Store>
  SR_DEVICE void sum_runs(const float* means, float* sums, int thread, const Store& store) const {
    const auto add = [&](float (&total)[kRun], int i, int c, const float (&center)[kRun]) {
      const auto x = load_shared<Vector<E, kRun>>(at(i, c));
#pragma unroll
      for (int r = 0; r < kRun; ++r) {
        const float value = to_float(x.element[r]) - center[r];
        total[r] += kSquares ? value * value : value;
      }
    };
    if (by_pixel) {  // a thread stays with a run of channels
      const int runs = channels / kRun, columns = runs < kBlockThreads ? runs : kBlockThreads;
      const int walkers = kBlockThreads / columns, walker = thread / columns;
#pragma unroll 1
      for (int run = thread % columns; run < runs && walker < walkers; run += columns) {
        float total[kRun] = {}, center[kRun] = {};
#pragma unroll
        for (int r = 0; r < kRun && kSquares; ++r)
          center[r] = load_shared<float>(means + run * kRun + r);
#pragma unroll 4
        for (int i = walker; i < pixels; i += walkers) add(total, i, run * kRun, center);
#pragma unroll
        for (int r = 0; r < kRun; ++r)
          store_shared<float>(sums + walker * channels + run * kRun + r, total[r]);
      }
      __syncthreads();
      for (int c = thread; c < channels; c += kBlockThreads) {
        float total = 0.0f;
#pragma unroll 4
        for (int i = 0; i < walkers; ++i) total += load_shared<float>(sums + i * channels + c);
        store(c, total);
      }
    } else {  // a warp with a channel
#pragma unroll 1
      for (int c = thread / 32; c < channels; c += kBlockThreads / 32) {
        float total[kRun] = {}, center[kRun] = {};
#pragma unroll
        for (int r = 0; r < kRun && kSquares; ++r) center[r] = load_shared<float>(means + c);
#pragma unroll 4
        for (int i = thread % 32 * kRun; i < pixels; i += 32 * kRun) add(total, i, c, center);
        float sum = total[0];
#pragma unroll
        for (int r = 1; r < kRun; ++r) sum += total[r];
        sum = warp_sum(sum);
        if (thread % 32 == 0) store(c, sum);
      }
    }
  }
};

// out = x gate, with x kept in shared memory meanwhile. Grid: chunks of every image, all blocks at
// once.
template <typename E>
__global__ void __launch_bounds__(kBlockThreads, 4) channel_attention_kernel(ChannelParams p) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t image = static_cast<int64_t>(p.height) * p.width;
  const int64_t n = blockIdx.x / p.chunks, chunk = blockIdx.x % p.chunks, first = chunk * p.share;
  const int count = static_cast<int>(image - first < p.share ? image - first : p.share);
  const PixelRun pixels(ImageSize{n + 1, p.height, p.width}, n * image + first);
  const bool by_pixel = p.x.stride_c == 1;
  const int run_of = by_pixel ? p.channels : p.width;  // a multiple of every run

  float* sums = shared_array<float>(0, channel_sums_floats(p.channels));
  float* z = shared_array<float>(4 * channel_sums_floats(p.channels), p.channels + p.hidden);
  const ChannelTile<E> tile{
      shared_array<E>(channel_tile_offset(p.channels, p.hidden), p.share * p.channels), by_pixel,
      by_pixel ? p.channels : p.share, count, p.channels};
  const ChannelGate<E> gate{p, n, z, z + p.channels};

  with_access_width<E>(
      run_places<E>(p.x, by_pixel) | static_cast<uint64_t>(run_of), [&](auto constant) {
        constexpr int kRun = constant, kBytes = kRun * static_cast<int>(sizeof(E));
        visit_runs<kRun>(
            by_pixel, pixels, count, p.channels, thread, [&](const Pixel& at, int i, int c) {
              if constexpr (kBytes < 4)
                store_shared(tile.at(i, c), load_run<E, kRun>(p.x, at, c));
              else
                copy_async<kBytes>(
                    tile.at(i, c),
                    static_cast<const E*>(p.x.data) + element_offset(p.x, at.n, c, at.h, at.w),
                    true);
            });
      });
  finish_copies();

  const auto put = [&](int c, float mean, float squares) {
    store_global(p.parts + (n * p.channels + c) * p.chunks + chunk,
                 Moments{static_cast<float>(count), mean, squares, 0.0f});
  };
  tile.template sum<false>(nullptr, sums, thread, [&](int c, float sum) {
    const float mean = sum / static_cast<float>(count);
    if (p.contrast)
      store_shared<float>(z + c, mean);
    else
      put(c, mean, 0.0f);
  });
  if (p.contrast)
    tile.template sum<true>(z, sums, thread,
                            [&](int c, float sum) { put(c, load_shared<float>(z + c), sum); });
  sync_grid();

  // A warp of the grid for each channel of each image.
  constexpr int kWarps = kBlockThreads / 32;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + thread / 32;
       i < p.batch * p.channels; i += static_cast<int64_t>(gridDim.x) * kWarps) {
    Moments total{0.0f, 0.0f, 0.0f, 0.0f};
    for (int part = thread % 32; part < p.chunks; part += 32)
      total = merge(total, load_global<Moments>(p.parts + i * p.chunks + part));
    for (int step = 16; step > 0; step /= 2)  // lanes without parts are the last ones
      total = merge(total, {__shfl_down_sync(kFullWarp, total.count, step),
                            __shfl_down_sync(kFullWarp, total.mean, step),
                            __shfl_down_sync(kFullWarp, total.squares, step), 0.0f});
    if (thread % 32 == 0) store_global<float>(p.z + i, gate.statistic(total));
  }
  sync_grid();

  for (int c = thread; c < p.channels; c += kBlockThreads)
    store_shared<float>(z + c, load_global<float>(p.z + n * p.channels + c));
  gate.find_hidden(thread);
  gate.find_gates(thread);
  with_access_width<E>(
      run_places<E>(p.out, by_pixel) | static_cast<uint64_t>(run_of), [&](auto constant) {
        constexpr int kRun = constant;
        visit_runs<kRun>(by_pixel, pixels, count, p.channels, thread,
                         [&](const Pixel& at, int i, int c) {
                           scale_run<E, kRun>(p, by_pixel, z, at, c,
                                              load_shared<Vector<E, kRun>>(tile.at(i, c)));
                         });
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
