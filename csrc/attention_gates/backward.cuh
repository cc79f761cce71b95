// Attention gates on CUDA, backward. s, t and gate are the sigmoids; g the gradient of y.
//
//   pixel    dz = g x s (1 - s), dx = g s + W^T dz, dW = dz x^T, db = sum dz
//   spatial  d = (sum_c g u) t (1 - t)                              spatial_gate_gradient_kernel
//            du = g t + conv^T(d) of the mean / C + of the maximum, divided between the channels
//            that share it                                         spatial_input_gradient_kernel
//            dW = sum_p d [max, mean] shifted, db = sum d         spatial_weight_gradient_kernel,
//                                                                          spatial_reduce_kernel
//   channel  dgate = sum_p g x, then back through both layers to dz (moments_kernel, then
//            channel_gate_gradient_kernel; channel_weight_gradient_kernel), and
//            dx = g gate + dz / HW (+ dz (x - mean) / (HW deviation))
//                                                                  channel_input_gradient_kernel
//   gated    dx = gate (W^T g); with G = sum_p g x^T of each image,
//            dW = sum_n gate G, dgate = sum_m W G, db = sum g                gated_reduce_kernel
//
// Tile: products' as in forward.cuh and shift_conv/backward.cuh. Spatial: a thread for each pixel,
// which goes over its channels; of the weights, a block for each tap and slice of the pixels, 256
// at a time. Channel: blocks of 8 channels and 256 pixels; between the sums and dx one block an
// image. Reductions of parts: a thread for each result.
//
// s, t, u and the statistics are computed again, except that u and dz, where both are needed, lie
// in the workspace between two kernels. Products with W^T are shift_conv's convolution without a
// shift, weight gradients its weight_gradient_kernel (one launch an image for a gated convolution).
// All sums over pixels are made in two stages whose number of parts depends on the sizes alone: no
// atomics, the same bits every time.
//
// Floor, per pixel, C channels, e bytes an element, k x k taps. Each is a sequence of kernels; what
// it takes here is their sum, for up to 64 channels:
//   pixel    3 e C bytes, 6 C C FLOP, C exponentials. Here 10 e C bytes: x three times, g, dz
//            written and read twice, g s written and read, dx
//   spatial  3 e C bytes, 8 C + 12 k k FLOP, one exponential. Here 7 e C bytes: u four times, g
//            twice, du; of the float planes 32 bytes, their neighbours from the caches
//   both     3 e C bytes, 6 C C + 8 C + 12 k k FLOP, C + 1 exponentials. Here 19 e C bytes, 8 C C
//            FLOP and 2 C + 1 exponentials: u and its statistics made, spatial, pixel
//   channel  3 e C bytes, 5 C FLOP (contrast: 11 C), C exponentials an image. Here 4 e C bytes
//            (contrast: 5 e C): x and g for the sums, then g (and x), dx. Of the gate alone, e C
//            less in floor, and here 2 e C less
//   gated    e (2 C_in + C_out) bytes, 4 C_in C_out FLOP, no exponentials. Here g twice
// With more channels a product reads its operands again for every 64 of the others.
// Measured fraction: unmeasured, never run on a GPU.
#pragma once

#include "attention_gates/forward.cuh"
#include "shift_conv/backward.cuh"

namespace sr_kernels {

// ------------------------------------------------------------------ spatial attention

template <typename E>
__global__ void __launch_bounds__(kBlockThreads) spatial_gate_gradient_kernel(SpatialParams p) {
  const PixelRun pixel(p.size, thread_index());
  const Pixel at = pixel[0];
  if (!at.exists) return;
  const float gate = spatial_gate<E>(p, at);
  float sum = 0.0f;
#pragma unroll 4
  for (int c = 0; c < p.channels; ++c)
    sum += to_float(load_element<E>(p.grad, at.n, c, at.h, at.w)) *
           to_float(load_element<E>(p.u, at.n, c, at.h, at.w));
  store_global<float>(p.gate + pixel.first, gate);
  store_global<float>(p.d + pixel.first, sum * gate * (1.0f - gate));
}

// out = du.
template <typename E>
__global__ void __launch_bounds__(kBlockThreads) spatial_input_gradient_kernel(SpatialParams p) {
  const PixelRun pixel(p.size, thread_index());
  const Pixel at = pixel[0];
  if (!at.exists) return;
  const E* weight = static_cast<const E*>(p.weight);
  const int radius = p.kernel / 2, area = p.kernel * p.kernel;
  float of_maximum = 0.0f, of_mean = 0.0f;
#pragma unroll 1
  for (int i = 0; i < p.kernel; ++i)
#pragma unroll 1
    for (int j = 0; j < p.kernel; ++j) {
      const int h = at.h - i + radius, w = at.w - j + radius, tap = i * p.kernel + j;
      if (!p.size.has(h, w)) continue;
      const float d = load_global<float>(p.d + (at.n * p.size.height + h) * p.size.width + w);
      of_maximum += to_float(load_global<E>(weight + tap)) * d;
      of_mean += to_float(load_global<E>(weight + area + tap)) * d;
    }
  const float maximum = load_global<float>(p.maximum + pixel.first);
  const float gate = load_global<float>(p.gate + pixel.first);
  float sharers = 0.0f;
#pragma unroll 4
  for (int c = 0; c < p.channels; ++c)
    if (to_float(load_element<E>(p.u, at.n, c, at.h, at.w)) == maximum) sharers += 1.0f;
  of_maximum /= sharers;
  of_mean /= static_cast<float>(p.channels);
#pragma unroll 2
  for (int c = 0; c < p.channels; ++c) {
    const float u = to_float(load_element<E>(p.u, at.n, c, at.h, at.w));
    const float grad = to_float(load_element<E>(p.grad, at.n, c, at.h, at.w));
    const float du = grad * gate + of_mean + (u == maximum ? of_maximum : 0.0f);
    store_element(p.out, at.n, c, at.h, at.w, from_float<E>(du));
  }
}

// Grid: slices, 2 kernel^2 + 1 taps, the last of which is the bias. taps[slice][tap] = the sum of d
// times what the tap sees, over every slices-th run of 256 pixels.
template <typename E>
__global__ void __launch_bounds__(kBlockThreads) spatial_weight_gradient_kernel(SpatialParams p) {
  const int thread = static_cast<int>(threadIdx.x), tap = static_cast<int>(blockIdx.y);
  const int area = p.kernel * p.kernel, radius = p.kernel / 2;
  const int dh = tap % area / p.kernel - radius, dw = tap % area % p.kernel - radius;
  const float* plane = tap < area ? p.maximum : p.mean;
  float* partial = shared_array<float>(0, kBlockThreads / 32);
  float sum = 0.0f;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kBlockThreads; first < p.size.pixels();
       first += static_cast<int64_t>(p.slices) * kBlockThreads) {
    const Pixel at = PixelRun(p.size, first)[thread];
    if (!at.exists) continue;
    float seen = 1.0f;
    if (tap < 2 * area) {
      if (!p.size.has(at.h + dh, at.w + dw)) continue;
      seen =
          load_global<float>(plane + (at.n * p.size.height + at.h + dh) * p.size.width + at.w + dw);
    }
    sum += seen * load_global<float>(p.d + first + thread);
  }
  sum = block_sum(sum, partial, thread, kBlockThreads);
  if (thread == 0)
    store_global<float>(p.taps + static_cast<int64_t>(blockIdx.x) * (2 * area + 1) + tap, sum);
}

// dweight[i], and dbias as the last: the sum of their parts, in order; nullptr: not wanted.
template <typename E>
__global__ void __launch_bounds__(kBlockThreads)
    spatial_reduce_kernel(const float* taps, int slices, int count, E* dweight, E* dbias) {
  const int i = static_cast<int>(thread_index());
  if (i >= count) return;
  E* to = i + 1 == count ? dbias : dweight == nullptr ? nullptr : dweight + i;
  if (to == nullptr) return;
  float sum = 0.0f;
  for (int64_t slice = 0; slice < slices; ++slice)
    sum += load_global<float>(taps + slice * count + i);
  store_global<E>(to, from_float<E>(sum));
}

// ------------------------------------------------------------------ channel attention

// One block an image: from dgate to the gradients of both layers and dx's coefficients.
template <typename E>
__global__ void __launch_bounds__(kBlockThreads) channel_gate_gradient_kernel(ChannelParams p) {
  const int thread = static_cast<int>(threadIdx.x);
  float* z = shared_array<float>(0, 2 * (p.channels + p.hidden));
  float *up = z + p.channels, *hidden = up + p.channels, *down = hidden + p.hidden;
  const int64_t n = blockIdx.x;
  const ChannelGate<E> gate{p, n, z, hidden};
  gate.find(thread);
  for (int c = thread; c < p.channels; c += kBlockThreads) {
    const float value = gate(c);
    float dgate;
    if (p.gate_grad != nullptr)
      dgate = parameter<E>(p.gate_grad, n * p.gate_grad_stride_n + c * p.gate_grad_stride_c);
    else
      dgate = gate.moments(c).dot;
    const float d = dgate * value * (1.0f - value);
    store_shared<float>(up + c, d);
    store_global<float>(p.up + n * p.channels + c, d);
    store_global<float>(p.gate + n * p.channels + c, value);
    store_global<float>(p.z + n * p.channels + c, load_shared<float>(z + c));
  }
  __syncthreads();
  for (int r = thread / 32; r < p.hidden; r += kBlockThreads / 32) {
    float sum = 0.0f;
    for (int c = thread % 32; c < p.channels; c += 32)
      sum +=
          parameter<E>(p.w_up, static_cast<int64_t>(c) * p.hidden + r) * load_shared<float>(up + c);
    sum = warp_sum(sum);
    if (thread % 32 == 0) {
      const float value = load_shared<float>(hidden + r);
      const float d = value > 0.0f ? sum : 0.0f;
      store_shared<float>(down + r, d);
      store_global<float>(p.down + n * p.hidden + r, d);
      store_global<float>(p.hidden_values + n * p.hidden + r, value);
    }
  }
  __syncthreads();
  const float pixels = static_cast<float>(p.height) * static_cast<float>(p.width);
  for (int c = thread; c < p.channels; c += kBlockThreads) {
    float dz = 0.0f;
    for (int r = 0; r < p.hidden; ++r)
      dz += parameter<E>(p.w_down, static_cast<int64_t>(r) * p.channels + c) *
            load_shared<float>(down + r);
    const Moments m = gate.moments(c);
    const int64_t i = n * p.channels + c;
    store_global<float>(p.mean + i, m.mean);
    store_global<float>(p.offset + i, dz / pixels);
    // At a constant channel the derivative of the deviation is defined as zero.
    store_global<float>(p.slope + i,
                        m.squares > 0.0f ? dz / pixels / ChannelGate<E>::deviation(m) : 0.0f);
  }
}

// out = dx: grad gate + offset + slope (x - mean), without the first term where grad is absent.
// Blocks of 8 channels and 256 pixels.
constexpr int kGradientPixels = 256;
template <typename E>
__global__ void __launch_bounds__(kBlockThreads) channel_input_gradient_kernel(ChannelParams p) {
  const int thread = static_cast<int>(threadIdx.x);
  const int c = static_cast<int>(blockIdx.y) * kWalkChannels + walk_channel(p.x, thread);
  if (c >= p.channels) return;
  const ImageSize size{p.batch, p.height, p.width};
  const PixelRun pixels(size, static_cast<int64_t>(blockIdx.x) * kGradientPixels);
  for (int i = walk_pixel(p.x, thread); i < kGradientPixels; i += kWalkPixels) {
    const Pixel at = pixels[i];
    if (!at.exists) break;
    const int64_t nc = at.n * p.channels + c;
    float dx = load_global<float>(p.offset + nc);
    if (p.contrast)
      dx += load_global<float>(p.slope + nc) *
            (to_float(load_element<E>(p.x, at.n, c, at.h, at.w)) - load_global<float>(p.mean + nc));
    if (p.grad.data != nullptr)
      dx +=
          load_global<float>(p.gate + nc) * to_float(load_element<E>(p.grad, at.n, c, at.h, at.w));
    store_element(p.out, at.n, c, at.h, at.w, from_float<E>(dx));
  }
}

// Weights and biases of both layers, a thread each, images in order.
template <typename E>
__global__ void __launch_bounds__(kBlockThreads) channel_weight_gradient_kernel(ChannelParams p) {
  const int64_t weights = static_cast<int64_t>(p.channels) * p.hidden;
  int64_t i = thread_index();
  const auto sum_over_images = [&](const float* left, int64_t l, int64_t left_count,
                                   const float* right, int64_t r, int64_t right_count, void* to,
                                   int64_t index) {
    if (to == nullptr) return;
    float sum = 0.0f;
    for (int64_t n = 0; n < p.batch; ++n)
      sum += load_global<float>(left + n * left_count + l) *
             (right == nullptr ? 1.0f : load_global<float>(right + n * right_count + r));
    store_global<E>(static_cast<E*>(to) + index, from_float<E>(sum));
  };
  if (i < weights) {  // (hidden, C)
    sum_over_images(p.down, i / p.channels, p.hidden, p.z, i % p.channels, p.channels, p.dw_down,
                    i);
    return;
  }
  i -= weights;
  if (i < weights) {  // (C, hidden)
    sum_over_images(p.up, i / p.hidden, p.channels, p.hidden_values, i % p.hidden, p.hidden,
                    p.dw_up, i);
    return;
  }
  i -= weights;
  if (i < p.hidden) {
    sum_over_images(p.down, i, p.hidden, nullptr, 0, 0, p.db_down, i);
    return;
  }
  i -= p.hidden;
  if (i < p.channels) sum_over_images(p.up, i, p.channels, nullptr, 0, 0, p.db_up, i);
}

// ------------------------------------------------------------------ gated convolution

// From G of every image and slice, (N, slices, m_count, k_count), a thread for each channel k of
// the input: dgate[n][k] = sum_m W[m][k] G_n[m][k]; and one for each weight, dW = sum_n gate G_n.
struct GatedReduceParams {
  int64_t batch, m_count, k_count;
  int slices;
  float* products;
  float* bias_parts;  // (N, slices, m_count)
  const void *weight, *gate;
  void *dweight, *dgate, *dbias;
};
template <typename E>
__global__ void __launch_bounds__(kBlockThreads) gated_reduce_kernel(GatedReduceParams p) {
  int64_t i = thread_index();
  const int64_t weights = p.m_count * p.k_count, gates = p.batch * p.k_count;
  const auto product = [&](int64_t n, int64_t index) {
    float sum = 0.0f;
    for (int64_t slice = 0; slice < p.slices; ++slice)
      sum += load_global<float>(p.products + (n * p.slices + slice) * weights + index);
    return sum;
  };
  if (i < weights) {
    if (p.dweight == nullptr) return;
    float sum = 0.0f;
    for (int64_t n = 0; n < p.batch; ++n)
      sum += parameter<E>(p.gate, n * p.k_count + i % p.k_count) * product(n, i);
    store_global<E>(static_cast<E*>(p.dweight) + i, from_float<E>(sum));
    return;
  }
  i -= weights;
  if (i < gates) {
    if (p.dgate == nullptr) return;
    float sum = 0.0f;
    for (int64_t m = 0; m < p.m_count; ++m) {
      const int64_t index = m * p.k_count + i % p.k_count;
      sum += parameter<E>(p.weight, index) * product(i / p.k_count, index);
    }
    store_global<E>(static_cast<E*>(p.dgate) + i, from_float<E>(sum));
    return;
  }
  i -= gates;
  if (i >= p.m_count || p.dbias == nullptr) return;
  float sum = 0.0f;
  for (int64_t part = 0; part < p.batch * p.slices; ++part)
    sum += load_global<float>(p.bias_parts + part * p.m_count + i);
  store_global<E>(static_cast<E*>(p.dbias) + i, from_float<E>(sum));
}

}  // namespace sr_kernels
