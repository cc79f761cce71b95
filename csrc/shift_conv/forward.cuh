// Shift convolution on CUDA: one kernel for every 1x1 product over a feature map, and the fused
// block.
//
//   shift_conv2d       y = act(W S(x) + b) (+ residual)          conv_kernel
//   shift_conv_block   y = W1 S(act(W0 S(x) + b0)) + b1 (+ x)    block_kernel
//
// conv_kernel. Tile: 64 output channels x 128 consecutive pixels a block; input channels in pieces
// of 64, the shift being an offset in the load. In 16 bits a tile lies in shared memory as its map
// does, [channel][pixel] or (channels_last) [pixel][channel], copied asynchronously by runs of 16
// or 8 bytes where strides, widths and addresses allow; a run of pixels that is shifted sideways is
// made of an aligned one and one element. In float32 it is [channel][pixel] always. Products on
// tensor cores (16 bit) or by FFMA (float32, exact: there is no TF32 path). Sums pass through
// shared memory, so that activation, residual and the store run along memory, whatever the layout,
// by runs likewise (one by one with gelu and silu). The backward uses the same kernel: W transposed
// (read one by one), the shift in the store (S^T), and an activation's derivative as a factor.
//
// block_kernel. Tile: 8 x 16 pixels. S(x) with a halo of one pixel, 10 x 18, lies in shared memory,
// all channels. Hidden channels come 64 at a time: product over the haloed tile, activation, and
// the store into a second tile at the place where the second product wants them, which is its
// shift; the sums of y stay in registers (64 channels, or 192) until all hidden channels are
// through. Hidden values outside the image are zero, not act(b0). Weights come in pieces of 64 x
// 16, the next copied while one is multiplied.
//
// Floor, per pixel, C channels in and out, H hidden, e bytes an element:
//   shift_conv2d      e (C_in + C_out) bytes (+ e C_out residual), 2 C_in C_out FLOP
//   shift_conv_block  2 e C bytes, 4 C H FLOP; of the first product 192 / 128 are computed here
// and no exponentials but silu's, one for each value that it is applied to.
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

// Where S^T puts a channel of pixel `at`, which `offset` moves. What leaves the image on one side
// (lost) comes in on the other as 0: every element is written once.
struct Scattered {
  Pixel pixel;
  bool lost;
  SR_DEVICE Scattered(const ImageSize& size, const Pixel& at, const ShiftOffset& offset)
      : pixel{at.n, at.h + offset.dy, at.w + offset.dx, true},
        lost(!size.has(pixel.h, at.w) || !size.has(at.h, pixel.w)) {
    pixel.h = pixel.h < 0 ? size.height - 1 : (pixel.h >= size.height ? 0 : pixel.h);
    pixel.w = pixel.w < 0 ? size.width - 1 : (pixel.w >= size.width ? 0 : pixel.w);
  }
};
// For with_access_width: runs of channels move as one, runs of pixels do not.
SR_DEVICE uint64_t scatter_places(const Shift& scatter, bool channels_last) {
  if (scatter.pattern == ShiftPattern::kNone) return 0;
  return channels_last ? scatter.channels / scatter.groups : 1;
}

// Channels first_channel ... of S(x) at the given pixels into shared memory, element (c, p) to
// tile[c * stride_c + p * stride_p], for c < rows (a multiple of 4, in 16 bits of 8); zero outside
// the image and from `channels` on. With an activation, act(S(x)). One of the strides is 1; a run
// that is contiguous in tile and map goes there as an asynchronous copy: the caller waits.
template <typename E, int kPixels, typename Pixels>
SR_DEVICE void load_shifted(E* tile, int stride_c, int stride_p, int rows, const FeatureMap& x,
                            const ImageSize& size, const Pixels& pixels, const Shift& shift,
                            int first_channel, int channels, Activation activation, float slope,
                            int thread) {
  const E zero = from_float<E>(0.0f);
  const uint64_t one_by_one = fits_in_epilogue(activation) ? 0 : 1;
  const auto activated = [&](E value) {
    if (activation == Activation::kNone) return value;
    return from_float<E>(activate(activation, to_float(value), slope));
  };
  const auto load_one = [&](const Pixel& at, int c) {
    if (!at.exists || c >= channels) return zero;
    const ShiftOffset offset = shift(first_channel + c);
    if (!size.has(at.h + offset.dy, at.w + offset.dx)) return zero;
    return activated(
        load_element<E>(x, at.n, first_channel + c, at.h + offset.dy, at.w + offset.dx));
  };
  const auto store = [&](E* to, const auto& run, bool contiguous, int stride) {
    constexpr int kRun = static_cast<int>(sizeof(run) / sizeof(E));
    if (contiguous) {
      store_shared(to, run);
      return;
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) store_shared<E>(to + i * stride, run.element[i]);
  };

  if (x.stride_c == 1) {
    with_access_width<E>(run_places<E>(x, true) | first_channel | one_by_one, [&](auto constant) {
      constexpr int kRun = constant;
      for (int p = thread / kWalkChannels; p < kPixels; p += kWalkPixels) {
        const Pixel at = pixels[p];
        for (int c = thread % kWalkChannels * kRun; c < rows; c += kWalkChannels * kRun) {
          E* to = tile + c * stride_c + p * stride_p;
          const ShiftOffset offset = shift(first_channel + c);
          const ShiftOffset last = shift(first_channel + c + kRun - 1);
          if (kRun == 1 || c + kRun > channels || offset.dy != last.dy || offset.dx != last.dx) {
#pragma unroll 1
            for (int i = 0; i < kRun; ++i) store_shared<E>(to + i * stride_c, load_one(at, c + i));
            continue;
          }
          if constexpr (kRun > 1) {
            const Pixel from{at.n, at.h + offset.dy, at.w + offset.dx, at.exists};
            const bool there = at.exists && size.has(from.h, from.w);
            if (stride_c == 1 && activation == Activation::kNone) {
              const E* address = static_cast<const E*>(x.data);
              if (there) address += element_offset(x, from.n, first_channel + c, from.h, from.w);
              copy_async<kRun* static_cast<int>(sizeof(E))>(to, address, there);
              continue;
            }
            Vector<E, kRun> run;
#pragma unroll
            for (int i = 0; i < kRun; ++i) run.element[i] = zero;
            if (there) run = load_run<E, kRun>(x, from, first_channel + c);
            if (there && activation != Activation::kNone) {
#pragma unroll
              for (int i = 0; i < kRun; ++i)
                run.element[i] = from_float<E>(
                    activate_in_epilogue(activation, slope, to_float(run.element[i])));
            }
            store(to, run, stride_c == 1, stride_c);
          }
        }
      }
    });
    return;
  }
  with_access_width<E>(run_places<E>(x, false) | size.width | one_by_one, [&](auto constant) {
    constexpr int kRun = constant, kUnits = Pixels::template kUnits<kRun, kPixels>;
    constexpr int kStep = kBlockThreads / kUnits;  // channels at a time
    if (thread >= kUnits * kStep) return;
    const PixelUnit unit = pixels.template unit<kRun>(thread % kUnits);
    const Pixel& at = unit.at;
    for (int c = thread / kUnits; c < rows; c += kStep) {
      E* to = tile + c * stride_c + unit.index * stride_p;
      if (kRun == 1 || unit.count == 1) {
        store_shared<E>(to, load_one(at, c));
        continue;
      }
      if constexpr (kRun > 1) {
        const ShiftOffset offset = shift(first_channel + c);
        const Pixel from{at.n, at.h + offset.dy, at.w, at.exists};
        const bool there = at.exists && c < channels && size.has(from.h, from.w);
        const bool contiguous = Pixels::kAligned && stride_p == 1;
        if (contiguous && offset.dx == 0 && activation == Activation::kNone) {
          const E* address = static_cast<const E*>(x.data);
          if (there) address += element_offset(x, from.n, first_channel + c, from.h, from.w);
          copy_async<kRun* static_cast<int>(sizeof(E))>(to, address, there);
          continue;
        }
        Vector<E, kRun> run;
#pragma unroll
        for (int i = 0; i < kRun; ++i) run.element[i] = zero;
        if (there) run = load_run<E, kRun>(x, from, first_channel + c);
        if (offset.dx != 0) {  // the run beside it: one of its elements is another's
          const int w = offset.dx > 0 ? at.w + kRun : at.w - 1;
          E other = zero;
          if (there && w >= 0 && w < size.width)
            other = load_element<E>(x, at.n, first_channel + c, from.h, w);
          const Vector<E, kRun> middle = run;
#pragma unroll
          for (int i = 0; i < kRun; ++i)
            run.element[i] = offset.dx > 0
                                 ? (i + 1 < kRun ? middle.element[(i + 1) % kRun] : other)
                                 : (i > 0 ? middle.element[(i + kRun - 1) % kRun] : other);
        }
        if (activation != Activation::kNone) {
#pragma unroll
          for (int i = 0; i < kRun; ++i)
            run.element[i] =
                from_float<E>(activate_in_epilogue(activation, slope, to_float(run.element[i])));
        }
        store(to, run, contiguous, stride_p);
      }
    }
  });
}

// S(x) as the second operand of a product: [channel][pixel], or, in 16 bits and channels_last, as
// it comes, [pixel][channel], of which the last kPixels - kRows do not exist.
template <typename E, int kPixels, int kRows>
struct InputTile {
  static constexpr int kLdChannel = kPixels + 8;
  E* data;
  int ld;
  bool by_pixel;

  static constexpr bool kCanBeByPixel = sizeof(E) == 2;
  static SR_HOST_DEVICE constexpr int elements(int channels) {
    const int by_channel = channels * kLdChannel;
    const int by_pixel = kCanBeByPixel ? kRows * conflict_free_stride(channels) : 0;
    return by_channel > by_pixel ? by_channel : by_pixel;
  }
  static SR_HOST_DEVICE constexpr int bytes(int channels) {
    return elements(channels) * static_cast<int>(sizeof(E));
  }
  SR_DEVICE InputTile(int at, int channels, const FeatureMap& x)
      : data(shared_array<E>(at, elements(channels))),
        ld(kLdChannel),
        by_pixel(kCanBeByPixel && x.stride_c == 1) {
    if (by_pixel) ld = conflict_free_stride(channels);
  }

  // As load_shifted, without an activation.
  template <typename Pixels>
  SR_DEVICE void load(int rows, const FeatureMap& x, const ImageSize& size, const Pixels& pixels,
                      const Shift& shift, int first_channel, int channels, int thread) const {
    if (by_pixel)
      load_shifted<E, kRows>(data, 1, ld, rows, x, size, pixels, shift, first_channel, channels,
                             Activation::kNone, 0.0f, thread);
    else
      load_shifted<E, kPixels>(data, ld, 1, rows, x, size, pixels, shift, first_channel, channels,
                               Activation::kNone, 0.0f, thread);
  }
  // product += A times the channels from k on. A may be in memory as [k][m] in 16 bits.
  template <bool kAByK = false, typename Product>
  SR_DEVICE void accumulate(Product& product, const E* a, int lda, int k, int k_count,
                            int thread) const {
    if constexpr (kCanBeByPixel) {
      if (by_pixel)
        product.template accumulate<kAByK, true>(a, lda, data + k, ld, k_count, thread, kRows);
      else
        product.template accumulate<kAByK, false>(a, lda, data + k * kLdChannel, kLdChannel,
                                                  k_count, thread);
    } else {
      product.accumulate(a, lda, data + k * kLdChannel, kLdChannel, k_count, thread);
    }
  }
  // product += A, [m][pixel], times all pixels, [pixel][channel]; of a 16-bit tile without
  // pixels that do not exist.
  template <typename Product>
  SR_DEVICE void accumulate_transposed(Product& product, const E* a, int lda, int thread) const {
    static_assert(kCanBeByPixel && kRows == kPixels);
    if (by_pixel)
      product.accumulate(a, lda, data, ld, kPixels, thread);
    else
      product.template accumulate<false, true>(a, lda, data, kLdChannel, kPixels, thread);
  }
};

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
  using Input = InputTile<E, kPixels, kPixels>;
  using Stage = SumStage<kPixels>;
  static constexpr int kLdW = kK + Product::kPad;
  static constexpr int kInputAt = kProductRows * kLdW * static_cast<int>(sizeof(E));
  static constexpr int kOperandBytes = kInputAt + Input::bytes(kK);
  static constexpr int kSharedBytes = kOperandBytes > Stage::kBytes ? kOperandBytes : Stage::kBytes;
  static_assert(kSharedBytes <= kMaxSharedBytes, "starts on every GPU");
};

template <typename E>
__global__ void __launch_bounds__(kBlockThreads, sizeof(E) == 2 ? 2 : 1) conv_kernel(ConvParams p) {
  using Tile = ConvTile<E>;
  constexpr int kPixels = Tile::kPixels, kK = Tile::kK;
  const int thread = static_cast<int>(threadIdx.x);
  const int m0 = static_cast<int>(blockIdx.y) * kProductRows;
  const int m_count = p.m_count - m0 < kProductRows ? p.m_count - m0 : kProductRows;
  const PixelRun pixels(p.size, static_cast<int64_t>(blockIdx.x) * kPixels);
  E* weight = shared_array<E>(0, kProductRows * Tile::kLdW);
  const typename Tile::Input input(Tile::kInputAt, kK, p.x);

  typename Tile::Product product;
  for (int k0 = 0; k0 < p.k_count; k0 += kK) {
    const int k_count = p.k_count - k0 < kK ? p.k_count - k0 : kK;
    const int k_padded = round_up(k_count, kStepOfK<E>);
    if (k0 > 0) __syncthreads();
    load_weights<E, kK>(
        weight, Tile::kLdW, k_padded,
        static_cast<const E*>(p.weight) + m0 * p.weight_stride_m + k0 * p.weight_stride_k,
        p.weight_stride_m, p.weight_stride_k, m_count, k_count, thread);
    input.load(k_padded, p.x, p.size, pixels, p.shift, k0, k_count, thread);
    finish_copies();
    input.accumulate(product, weight, Tile::kLdW, 0, k_padded, thread);
  }
  __syncthreads();
  const typename Tile::Stage stage(p.out);
  stage.put(product, p.bias == nullptr ? nullptr : static_cast<const E*>(p.bias) + m0, m_count,
            thread);
  __syncthreads();

  const bool channels_last = stage.by_pixel;
  uint64_t places = run_places<E>(p.out, channels_last) | run_places<E>(p.grad, channels_last) |
                    run_places<E>(p.before, channels_last) |
                    run_places<E>(p.residual, channels_last) |
                    scatter_places(p.scatter, channels_last);
  if (!fits_in_epilogue(p.activation) || !fits_in_epilogue(p.before_activation)) places |= 1;
  stage.template visit<E>(
      places, pixels, p.size.width, m_count, thread, [&](const Pixel& at, int c, int, auto& value) {
        constexpr int kRun = static_cast<int>(sizeof(value) / sizeof(float));
        const int m = m0 + c;
        const Scattered target(p.size, at, p.scatter(m));
        const Pixel& to = target.pixel;
        if (p.grad.data != nullptr) {
          const auto grad = load_run<E, kRun>(p.grad, to, m);
#pragma unroll
          for (int i = 0; i < kRun; ++i)
            value[i] = to_float(grad.element[i]) *
                       (kRun == 1 ? activation_derivative(p.activation, value[i], p.slope)
                                  : derivative_in_epilogue(p.activation, p.slope, value[i]));
        } else {
#pragma unroll
          for (int i = 0; i < kRun; ++i)
            value[i] = kRun == 1 ? activate(p.activation, value[i], p.slope)
                                 : activate_in_epilogue(p.activation, p.slope, value[i]);
        }
        if (p.before.data != nullptr) {
          const auto before = load_run<E, kRun>(p.before, to, m);
#pragma unroll
          for (int i = 0; i < kRun; ++i) {
            const float z = to_float(before.element[i]);
            value[i] *= kRun == 1 ? activation_derivative(p.before_activation, z, p.slope)
                                  : derivative_in_epilogue(p.before_activation, p.slope, z);
          }
        }
        if (target.lost) {
#pragma unroll
          for (int i = 0; i < kRun; ++i) value[i] = 0.0f;
        }
        if (p.residual.data != nullptr) add_run<E>(value, p.residual, to, m);
        put_run<E>(value, p.out, to, m);
      });
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
  using Halo = RectanglePixels<kRows, kColumns, 1>;
  using Inner = RectanglePixels<kRows, kColumns, 0>;
  using First = TileProduct<E, kHaloPadded>;
  using Second = TileProduct<E, kPixels>;
  static constexpr int kK = 16;  // of a piece of weights, of which two are there
  using Input = InputTile<E, kHaloPadded, kHaloPixels>;
  using Stage = SumStage<kPixels>;
  static constexpr int kLdW = kK + 8, kLdHidden = kPixels + Second::kPad;
  static constexpr int kWeightElements = kProductRows * kLdW;
  static constexpr int kHiddenAt = 2 * kWeightElements * static_cast<int>(sizeof(E));
  static constexpr int kInputAt =
      kHiddenAt + kProductRows * kLdHidden * static_cast<int>(sizeof(E));

  static SR_HOST_DEVICE constexpr int input_rows(int c_in) { return round_up(c_in, kStepOfK<E>); }
  static constexpr int64_t shared_bytes(int c_in) {
    const int64_t bytes = kInputAt + Input::bytes(input_rows(c_in));
    return bytes > Stage::kBytes ? bytes : Stage::kBytes;
  }
};
static_assert(BlockTile<float, 1>::shared_bytes(64) <= kMaxSharedBytes &&
                  BlockTile<__half, 3>::shared_bytes(192) <= kMaxSharedBytes,
              "what the sums have registers for starts on every GPU");

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
  const typename Tile::Halo halo{p.size, n, h0 - 1, w0 - 1};

  E* weights = shared_array<E>(0, 2 * Tile::kWeightElements);
  E* hidden = shared_array<E>(Tile::kHiddenAt, kProductRows * Tile::kLdHidden);
  const int input_rows = Tile::input_rows(p.c_in);
  const typename Tile::Input input(Tile::kInputAt, input_rows, p.x);
  input.load(input_rows, p.x, p.size, halo, p.shift_in, 0, p.c_in, thread);

  // Pieces of weights, in the order in which they are used: of W0, all of K for 64 hidden channels,
  // then of W1 these channels for all outputs. The next is under way while one is multiplied.
  const E *w0_data = static_cast<const E*>(p.w0), *w1_data = static_cast<const E*>(p.w1);
  const auto load_piece = [&](int which, const E* from, int stride, int m_count, int k_count) {
    if (k_count > kK) k_count = kK;
    load_weights<E, kK>(weights + which * Tile::kWeightElements, Tile::kLdW,
                        round_up(k_count, kStepOfK<E>), from, stride, 1, m_count, k_count,
                        opaque(thread));
  };
  int buffer = 0;
  load_piece(0, w0_data, p.c_in, p.c_hidden, p.c_in);

  typename Tile::Second y[kOut];
#pragma unroll 1
  for (int j0 = 0; j0 < p.c_hidden; j0 += kProductRows) {
    const int j_count = p.c_hidden - j0 < kProductRows ? p.c_hidden - j0 : kProductRows;
    First z;
#pragma unroll 1
    for (int k0 = 0; k0 < p.c_in; k0 += kK) {
      finish_copies();  // this piece is there, that before it used up
      const int k = k0 + kK;
      const bool more = k < p.c_in;
      load_piece(buffer ^ 1, more ? w0_data + static_cast<int64_t>(j0) * p.c_in + k : w1_data + j0,
                 more ? p.c_in : p.c_hidden, more ? p.c_hidden - j0 : p.c_out,
                 more ? p.c_in - k : j_count);
      const int k_padded = input_rows - k0 < kK ? input_rows - k0 : kK;
      input.accumulate(z, weights + buffer * Tile::kWeightElements, Tile::kLdW, k0, k_padded,
                       thread);
      buffer ^= 1;
    }
    // The product of the hidden channels before these has read `hidden`: a barrier ago at least.
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
    const int j_padded = round_up(j_count, kStepOfK<E>);
#pragma unroll
    for (int out = 0; out < kOut; ++out) {
#pragma unroll 1
      for (int k0 = 0; k0 < j_padded; k0 += kK) {
        finish_copies();
        const int next = j0 + kProductRows;
        const int k = k0 + kK < j_padded ? k0 + kK : 0, m0 = (out + (k == 0)) * kProductRows;
        const bool more = m0 < kOut * kProductRows;
        if (more || next < p.c_hidden)
          load_piece(buffer ^ 1,
                     more ? w1_data + static_cast<int64_t>(m0) * p.c_hidden + j0 + k
                          : w0_data + static_cast<int64_t>(next) * p.c_in,
                     more ? p.c_hidden : p.c_in, more ? p.c_out - m0 : p.c_hidden - next,
                     more ? j_count - k : p.c_in);
        const int k_padded = j_padded - k0 < kK ? j_padded - k0 : kK;
        y[out].accumulate(weights + buffer * Tile::kWeightElements, Tile::kLdW,
                          hidden + k0 * Tile::kLdHidden, Tile::kLdHidden, k_padded, opaque(thread));
        buffer ^= 1;
      }
    }
  }

  const typename Tile::Stage stage(p.y);
  const typename Tile::Inner inner{p.size, n, h0, w0};
  const uint64_t places =
      run_places<E>(p.y, stage.by_pixel) | (p.residual ? run_places<E>(p.x, stage.by_pixel) : 0);
#pragma unroll
  for (int out = 0; out < kOut; ++out) {
    const int m0 = out * kProductRows;
    const int m_count = p.c_out - m0 < kProductRows ? p.c_out - m0 : kProductRows;
    __syncthreads();
    stage.put(y[out], p.b1 == nullptr ? nullptr : static_cast<const E*>(p.b1) + m0, m_count,
              thread);
    __syncthreads();
    stage.template visit<E>(places, inner, p.size.width, m_count, thread,
                            [&](const Pixel& at, int c, int, auto& value) {
                              if (p.residual) add_run<E>(value, p.x, at, m0 + c);
                              put_run<E>(value, p.y, at, m0 + c);
                            });
  }
}

}  // namespace sr_kernels
