// Shift convolution on CUDA: one kernel for every 1x1 product over a feature map, and the fused
// block.
//
//   shift_conv2d       y = act(W S(x) + b) (+ residual)          conv_kernel
//   shift_conv_block   y = W1 S(act(W0 S(x) + b0)) + b1 (+ x)    block_kernel
//
// conv_kernel. Tile: 64 output channels x 128 consecutive pixels a block; input channels in pieces
// of 64, loaded as [channel][pixel], the shift being an offset in the load. Products on tensor
// cores (16 bit) or by FFMA (float32, exact: there is no TF32 path). Sums pass through shared
// memory, so that bias, activation, residual and the store run along memory, whatever the layout.
// The backward uses the same kernel: W transposed, the shift in the store (S^T), and an
// activation's derivative as a factor.
//
// block_kernel. Tile: 8 x 16 pixels. S(x) with a halo of one pixel, 10 x 18, lies in shared memory,
// all channels. Hidden channels come 64 at a time: product over the haloed tile, activation, and
// the store into a second tile at the place where the second product wants them, which is its
// shift; the sums of y stay in registers (64 channels, or 192) until all hidden channels are
// through. Hidden values outside the image are zero, not act(b0).
//
// Floor, per pixel, C channels in and out, H hidden, e bytes an element:
//   shift_conv2d      e (C_in + C_out) bytes (+ e C_out residual), 2 C_in C_out FLOP
//   shift_conv_block  2 e C bytes, 4 C H FLOP; of the first product 192 / 128 are computed here
// Measured fraction: unmeasured, never run on a GPU.
#pragma once

#include "common/pixel_tile.cuh"
#include "shift_conv/params.h"

namespace sr_kernels {

// A shift by channel group; pattern kNone: none.
struct Shift {
  ShiftPattern pattern = ShiftPattern::kNone;
  int channels = 1, groups = 5;
  SR_DEVICE ShiftOffset operator()(int channel) const {
    return shift_offset(pattern, channel, channels, groups);
  }
};

// Activations of an instruction or two are applied to sums in registers; exp and erf, inlined for
// each of them, would push them out.
SR_DEVICE bool fits_in_epilogue(Activation activation) {
  return activation != Activation::kGelu && activation != Activation::kSilu;
}
SR_DEVICE float activate_in_epilogue(Activation activation, float slope, float z) {
  if (activation == Activation::kRelu) return z < 0.0f ? 0.0f : z;
  if (activation == Activation::kLeakyRelu) return z > 0.0f ? z : z * slope;
  return z;
}

// Channels first_channel ... of S(x) at the given pixels into shared memory, element (c, p) to
// tile[c * stride_c + p * stride_p], for c < rows; zero outside the image and from `channels` on.
// With an activation, act(S(x)).
template <typename E, int kPixels, typename Pixels>
SR_DEVICE void load_shifted(E* tile, int stride_c, int stride_p, int rows, const FeatureMap& x,
                            const ImageSize& size, const Pixels& pixels, const Shift& shift,
                            int first_channel, int channels, Activation activation, float slope,
                            int thread) {
  for (int p = walk_pixel(x, thread); p < kPixels; p += kWalkPixels) {
    const Pixel at = pixels[p];
    for (int c = walk_channel(x, thread); c < rows; c += kWalkChannels) {
      E value = from_float<E>(0.0f);
      if (at.exists && c < channels) {
        const ShiftOffset offset = shift(first_channel + c);
        if (size.has(at.h + offset.dy, at.w + offset.dx)) {
          value = load_element<E>(x, at.n, first_channel + c, at.h + offset.dy, at.w + offset.dx);
          if (activation != Activation::kNone)
            value = from_float<E>(activate(activation, to_float(value), slope));
        }
      }
      store_shared<E>(tile + c * stride_c + p * stride_p, value);
    }
  }
}

// ------------------------------------------------------------------ one product

// z = W S(x) + b at each pixel p, then, at the pixel q where channel m of p belongs:
//   value = act(z), or grad[q] act'(z) where grad is given
//   value *= act'(before[q])                where `before` is given
//   out[q] = value + residual[q]            where residual is given
// q is p; with scatter it is p moved by scatter(m), and what leaves the image on one side comes in
// on the other as 0: S^T, every element written once.
struct ConvParams {
  ImageSize size;
  int k_count, m_count;
  FeatureMap x;
  Shift shift;
  const void *weight, *bias;
  int64_t weight_stride_m, weight_stride_k;
  Activation activation, before_activation;
  float slope;
  FeatureMap grad, before, residual;  // data nullptr: absent
  Shift scatter;
  FeatureMap out;
};

template <typename E>
struct ConvTile {
  static constexpr int kPixels = 128, kK = 64;
  using Product = TileProduct<E, kPixels>;
  static constexpr int kLdW = kK + Product::kPad, kLdX = kPixels + Product::kPad;
  static constexpr int kLdStage = kPixels + 8;
  static constexpr int kInputAt = kProductRows * kLdW * static_cast<int>(sizeof(E));
  static constexpr int kOperandBytes = kInputAt + kK * kLdX * static_cast<int>(sizeof(E));
  static constexpr int kStageBytes = kProductRows * kLdStage * 4;
  static constexpr int kSharedBytes = kOperandBytes > kStageBytes ? kOperandBytes : kStageBytes;
};

template <typename E>
__global__ void __launch_bounds__(kBlockThreads) conv_kernel(ConvParams p) {
  using Tile = ConvTile<E>;
  constexpr int kPixels = Tile::kPixels, kK = Tile::kK;
  const int thread = static_cast<int>(threadIdx.x);
  const int m0 = static_cast<int>(blockIdx.y) * kProductRows;
  const int m_count = p.m_count - m0 < kProductRows ? p.m_count - m0 : kProductRows;
  const PixelRun pixels(p.size, static_cast<int64_t>(blockIdx.x) * kPixels);
  E* weight = shared_array<E>(0, kProductRows * Tile::kLdW);
  E* input = shared_array<E>(Tile::kInputAt, kK * Tile::kLdX);

  typename Tile::Product product;
  for (int k0 = 0; k0 < p.k_count; k0 += kK) {
    const int k_count = p.k_count - k0 < kK ? p.k_count - k0 : kK;
    const int k_padded =
        (k_count + Tile::Product::kStepK - 1) / Tile::Product::kStepK * Tile::Product::kStepK;
    if (k0 > 0) __syncthreads();
    load_weights<E, kK>(
        weight, Tile::kLdW, k_padded,
        static_cast<const E*>(p.weight) + m0 * p.weight_stride_m + k0 * p.weight_stride_k,
        p.weight_stride_m, p.weight_stride_k, m_count, k_count, thread);
    load_shifted<E, kPixels>(input, Tile::kLdX, 1, k_padded, p.x, p.size, pixels, p.shift, k0,
                             k_count, Activation::kNone, 0.0f, thread);
    __syncthreads();
    product.accumulate(weight, Tile::kLdW, input, Tile::kLdX, k_padded, thread);
  }
  __syncthreads();
  float* stage = shared_array<float>(0, kProductRows * Tile::kLdStage);
  product.visit(thread, [&](int m, int pixel, float first, float second) {
    store_shared(stage + m * Tile::kLdStage + pixel, Vector<float, 2>{{first, second}});
  });
  __syncthreads();

  for (int i = walk_pixel(p.out, thread); i < kPixels; i += kWalkPixels) {
    const Pixel at = pixels[i];
    if (!at.exists) continue;
#pragma unroll 1
    for (int c = walk_channel(p.out, thread); c < m_count; c += kWalkChannels) {
      const int m = m0 + c;
      const ShiftOffset offset = p.scatter(m);
      int h = at.h + offset.dy, w = at.w + offset.dx;
      const bool lost = !p.size.has(h, w);
      h = h < 0 ? p.size.height - 1 : (h >= p.size.height ? 0 : h);
      w = w < 0 ? p.size.width - 1 : (w >= p.size.width ? 0 : w);
      float value = load_shared<float>(stage + c * Tile::kLdStage + i);
      if (p.bias != nullptr) value += to_float(load_global<E>(static_cast<const E*>(p.bias) + m));
      if (p.grad.data != nullptr)
        value = to_float(load_element<E>(p.grad, at.n, m, h, w)) *
                activation_derivative(p.activation, value, p.slope);
      else
        value = activate(p.activation, value, p.slope);
      if (p.before.data != nullptr)
        value *= activation_derivative(p.before_activation,
                                       to_float(load_element<E>(p.before, at.n, m, h, w)), p.slope);
      if (lost) value = 0.0f;
      if (p.residual.data != nullptr) value += to_float(load_element<E>(p.residual, at.n, m, h, w));
      store_element<E>(p.out, at.n, m, h, w, from_float<E>(value));
    }
  }
}

// ------------------------------------------------------------------ the block

struct BlockParams {
  ImageSize size;
  int c_in, c_hidden, c_out;
  FeatureMap x, y;
  const void *w0, *b0, *w1, *b1;
  Shift shift_in, shift_hidden;
  Activation activation;
  float slope;
  bool residual;
};

// kOut: y's channels in registers, in units of 64.
template <typename E, int kOut>
struct BlockTile {
  static constexpr int kRows = 8, kColumns = 16, kPixels = kRows * kColumns;
  static constexpr int kHaloColumns = kColumns + 2, kHaloPixels = (kRows + 2) * kHaloColumns;
  static constexpr int kHaloPadded = 192;  // what the first product computes
  using First = TileProduct<E, kHaloPadded>;
  using Second = TileProduct<E, kPixels>;
  static constexpr int kK = 32;  // of a piece of weights
  static constexpr int kLdW = kK + 8, kLdX = kHaloPadded + First::kPad;
  static constexpr int kLdHidden = kPixels + Second::kPad, kLdStage = kPixels + 8;
  static constexpr int kHiddenAt = kProductRows * kLdW * static_cast<int>(sizeof(E));
  static constexpr int kInputAt =
      kHiddenAt + kProductRows * kLdHidden * static_cast<int>(sizeof(E));
  static constexpr int kStageBytes = kProductRows * kLdStage * 4;

  static SR_HOST_DEVICE int input_rows(int c_in) {
    return (c_in + First::kStepK - 1) / First::kStepK * First::kStepK;
  }
  static int64_t shared_bytes(int c_in) {
    const int64_t bytes =
        kInputAt + int64_t{input_rows(c_in)} * kLdX * static_cast<int64_t>(sizeof(E));
    return bytes > kStageBytes ? bytes : kStageBytes;
  }
};

// A tile with its halo, row after row.
struct HaloPixels {
  int64_t n;
  int h0, w0, columns, count;  // h0, w0 of the first pixel: -1 at the image's corner
  SR_DEVICE Pixel operator[](int i) const {
    return {n, h0 + i / columns, w0 + i % columns, i < count};
  }
};

template <typename E, int kOut>
__global__ void __launch_bounds__(kBlockThreads, kOut == 1 && sizeof(E) == 2 ? 2 : 1)
    block_kernel(BlockParams p) {
  using Tile = BlockTile<E, kOut>;
  using First = typename Tile::First;
  constexpr int kK = Tile::kK;
  const int thread = static_cast<int>(threadIdx.x);
  const int tiles_w = (p.size.width + Tile::kColumns - 1) / Tile::kColumns;
  const int tiles_h = (p.size.height + Tile::kRows - 1) / Tile::kRows;
  const int w0 = static_cast<int>(blockIdx.x % tiles_w) * Tile::kColumns;
  const int h0 = static_cast<int>(blockIdx.x / tiles_w % tiles_h) * Tile::kRows;
  const int64_t n = blockIdx.x / tiles_w / tiles_h;
  const HaloPixels halo{n, h0 - 1, w0 - 1, Tile::kHaloColumns, Tile::kHaloPixels};

  E* weight = shared_array<E>(0, kProductRows * Tile::kLdW);
  E* hidden = shared_array<E>(Tile::kHiddenAt, kProductRows * Tile::kLdHidden);
  const int input_rows = Tile::input_rows(p.c_in);
  E* input = shared_array<E>(Tile::kInputAt, input_rows * Tile::kLdX);
  load_shifted<E, Tile::kHaloPadded>(input, Tile::kLdX, 1, input_rows, p.x, p.size, halo,
                                     p.shift_in, 0, p.c_in, Activation::kNone, 0.0f, thread);

  typename Tile::Second y[kOut];
#pragma unroll 1
  for (int j0 = 0; j0 < p.c_hidden; j0 += kProductRows) {
    const int j_count = p.c_hidden - j0 < kProductRows ? p.c_hidden - j0 : kProductRows;
    First z;
#pragma unroll 1
    for (int k0 = 0; k0 < input_rows; k0 += kK) {
      const int k_padded = input_rows - k0 < kK ? input_rows - k0 : kK;
      __syncthreads();  // the weights before these are used up; the first time: input is there
      load_weights<E, kK>(weight, Tile::kLdW, k_padded,
                          static_cast<const E*>(p.w0) + static_cast<int64_t>(j0) * p.c_in + k0,
                          p.c_in, 1, j_count, p.c_in - k0, thread);
      __syncthreads();
      z.accumulate(weight, Tile::kLdW, input + k0 * Tile::kLdX, Tile::kLdX, k_padded, thread);
    }
    // The product of the hidden channels before these has read `hidden`: two barriers ago at least.
    z.visit(opaque(thread), [&](int row, int column, float first, float second) {
      const bool real = row < j_count;
      const ShiftOffset offset = p.shift_hidden(j0 + row);
      float bias = 0.0f;
      if (real && p.b0 != nullptr)
        bias = to_float(load_global<E>(static_cast<const E*>(p.b0) + j0 + row));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Pixel at = halo[column + i];
        const int h = at.h - h0 - offset.dy, w = at.w - w0 - offset.dx;
        if (!at.exists || h < 0 || h >= Tile::kRows || w < 0 || w >= Tile::kColumns) continue;
        const float value =
            real && p.size.has(at.h, at.w)
                ? activate_in_epilogue(p.activation, p.slope, (i == 0 ? first : second) + bias)
                : 0.0f;
        store_shared<E>(hidden + row * Tile::kLdHidden + h * Tile::kColumns + w,
                        from_float<E>(value));
      }
    });
    if (!fits_in_epilogue(p.activation)) {
      __syncthreads();
#pragma unroll 1
      for (int i = thread; i < kProductRows * Tile::kPixels; i += kBlockThreads) {
        E* element = hidden + i / Tile::kPixels * Tile::kLdHidden + i % Tile::kPixels;
        const float value = to_float(load_shared<E>(element));
        store_shared<E>(element, from_float<E>(activate(p.activation, value, p.slope)));
      }
    }
    const int j_padded = (j_count + First::kStepK - 1) / First::kStepK * First::kStepK;
#pragma unroll
    for (int out = 0; out < kOut; ++out) {
      const int m0 = out * kProductRows;
      for (int k0 = 0; k0 < j_padded; k0 += kK) {
        const int k_padded = j_padded - k0 < kK ? j_padded - k0 : kK;
        __syncthreads();
        load_weights<E, kK>(
            weight, Tile::kLdW, k_padded,
            static_cast<const E*>(p.w1) + static_cast<int64_t>(m0) * p.c_hidden + j0 + k0,
            p.c_hidden, 1, p.c_out - m0, j_count - k0, thread);
        __syncthreads();
        y[out].accumulate(weight, Tile::kLdW, hidden + k0 * Tile::kLdHidden, Tile::kLdHidden,
                          k_padded, thread);
      }
    }
  }

  float* stage = shared_array<float>(0, kProductRows * Tile::kLdStage);
#pragma unroll
  for (int out = 0; out < kOut; ++out) {
    __syncthreads();
    y[out].visit(thread, [&](int m, int pixel, float first, float second) {
      store_shared(stage + m * Tile::kLdStage + pixel, Vector<float, 2>{{first, second}});
    });
    __syncthreads();
    const int m0 = out * kProductRows;
    for (int i = walk_pixel(p.y, thread); i < Tile::kPixels; i += kWalkPixels) {
      const int h = h0 + i / Tile::kColumns, w = w0 + i % Tile::kColumns;
      if (!p.size.has(h, w)) continue;
      for (int c = walk_channel(p.y, thread); c < kProductRows && m0 + c < p.c_out;
           c += kWalkChannels) {
        float value = load_shared<float>(stage + c * Tile::kLdStage + i);
        if (p.b1 != nullptr)
          value += to_float(load_global<E>(static_cast<const E*>(p.b1) + m0 + c));
        if (p.residual) value += to_float(load_element<E>(p.x, n, m0 + c, h, w));
        store_element<E>(p.y, n, m0 + c, h, w, from_float<E>(value));
      }
    }
  }
}

}  // namespace sr_kernels
