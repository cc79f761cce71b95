// Shift convolution on the CPU.
//
//   shift_conv2d       y = act(W shift(x) + b) (+ residual)
//   shift_conv_block   y = W1 shift(act(W0 shift(x) + b0)) + b1 (+ x)
//
// Tile: part of a row of pixels, all channels. shift_conv2d's shift is an offset in the load of the
// product's operand. The block needs none of its hidden values twice (see block_forward), so it
// computes them strip by strip, c_hidden x 64, from three rows of shift(x) in L2. Bias, activation
// and residual are applied to the products' accumulators. For channels_last maps whose channels
// fill vectors well (C = 60 with AVX2) the block's vectors run along channels instead, and nothing
// is transposed (block_forward_pixels).
//
// Floor, float32, per pixel: shift_conv2d moves 4 (c_in + c_out) bytes and does 2 c_in c_out FLOP;
// the block at C = 60, ratio 2 moves 480 bytes and does 28.8 kFLOP: bound by arithmetic, so the
// ceiling is a large fp32 matrix product on the same cores. Measured at 180 x 320 on one Zen 3 core
// (AVX2), where a 1024 x 1024 product in the same run reached 94 GFLOP/s: the block 76 GFLOP/s, a
// fraction of 0.81 (C = 52: 0.77, 64: 0.80, 180: 0.81; channels_last 0.75 to 0.81); shift_conv2d,
// 60 -> 60 and 60 -> 120, 0.63 and 0.74, channels_last 0.53 and 0.61. The channels_last block at
// C = 60 was measured before its vectors ran along channels, which takes 0.93 of the time: 22.6 ms
// where it took 24.2, at 192 x 320, one thread of a shared Zen 3 core, minima of process time.
// Where nothing moves, channels_last maps are read in place: at 96 x 96, one thread, 55 -> 55 with
// a residual 0.8 ms (1.0 to 1.2 through transpositions), 55 -> 165 2.7 ms (2.9 to 3.2), a fraction
// of 0.8; 55 -> 110 -> 55 2.9 ms, 0.97 (3.0), and 4.5 ms with GELU (4.8), whose exponential and erf
// take 1.6.
//
// Backward. With z the pre-activation, dz = grad * act'(z) and S the shift:
//   dW = dz S(x)^T,  db = sum dz,  dx = S^T(W^T dz).
// z is recomputed from x, never stored. S^T moves each channel by -offset: a bijection of pixels
// but for the border, so every element of dx is written by exactly one tile.
//
// The block's backward takes shift(x), the hidden values, their gradient and grad of a tile through
// five products of equal size (z again, dh, dW1, dW0, dx), 72 kFLOP a pixel at ratio 2. Tiles of 8
// rows, 0.8 MB at C = 60, stay in L2 less well than tiles of 4, but the weight gradients' rows are
// twice as long. Measured at 4 x 60 x 64 x 64 on a shared Zen 3 core: 16.5 ms (tiles of 4: 17.0
// to 17.3) where a 1024 x 1024 product reached 93 to 95 GFLOP/s, a fraction of 0.76.
#include "shift_conv/params.h"

#include "common/activate_vectors.h"
#include "common/pixel_product.h"
#include "common/tiling.h"

namespace sr_kernels {
namespace SR_KERNELS_ISA {
namespace {

// ------------------------------------------------------------------ derivatives of activations

// gradient <- gradient * act'(z)
template <typename T>
void multiply_by_derivative(Activation activation, T slope, const T* z, T* gradient,
                            int64_t count) {
  using V = Vec<T>;
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kRelu:
      return transform(gradient, z, count, [](V g, V v) { return v > 0 ? g : V{}; });
    case Activation::kLeakyRelu:
      return transform(gradient, z, count, [slope](V g, V v) { return v > 0 ? g : g * slope; });
    case Activation::kGelu:
      return transform(gradient, z, count, [](V g, V v) {
        const V density = exp(v * v * T(-0.5)) * T(0.39894228040143267794);
        return g * (gaussian_cdf<T>(v) + v * density);
      });
    case Activation::kSilu:
      return transform(gradient, z, count, [](V g, V v) {
        const V s = sigmoid(v);
        return g * s * (1 + v * (1 - s));
      });
  }
}

// ------------------------------------------------------------------ shifted tiles

// A run of channels that share one shift.
struct ShiftedRun {
  int64_t begin, end;
  ShiftOffset offset;
};

struct ShiftedRuns {
  ShiftedRun run[5];
  int count = 0;
  ShiftedRuns(ShiftPattern pattern, int64_t channels, int groups) {
    if (pattern == ShiftPattern::kNone) {
      run[count++] = {0, channels, {0, 0}};
      return;
    }
    for (int64_t c = 0; c < channels;) {
      const int group = shift_group(static_cast<int>(c), static_cast<int>(channels), groups);
      int64_t end = c + 1;
      while (end < channels &&
             shift_group(static_cast<int>(end), static_cast<int>(channels), groups) == group)
        ++end;
      run[count++] = {c, end, shift_offset_of_group(pattern, group)};
      c = end;
    }
  }
  const ShiftedRun* begin() const { return run; }
  const ShiftedRun* end() const { return run + count; }
};

// shift(x) on a tile: destination[c][r * row_stride + i] = x[n, c, h0 + r + dy, w0 + i + dx].
template <typename S, typename T>
void load_shifted(const ShiftedRuns& runs, const FeatureMap& x, int64_t n, int64_t h0, int64_t rows,
                  int64_t w0, int64_t columns, int64_t height, int64_t width, T* destination,
                  int64_t channel_stride, int64_t row_stride) {
  for (const ShiftedRun& run : runs)
    load_tile<S>(x, n, run.begin, run.end - run.begin, h0 + run.offset.dy, rows, w0 + run.offset.dx,
                 columns, height, width, destination + run.begin * channel_stride, channel_stride,
                 row_stride);
}

// Asks for channels [c_begin, c_end) of a part of a row of shift(x), [w0, w0 + columns). The runs
// are too short and too many for the hardware to foresee; those of channels_last are long and few.
// Always inline: g++ 12 takes a function that only prefetches for one without effects, and drops
// the call.
template <typename S>
SR_INLINE void prefetch_shifted(const ShiftedRuns& runs, const FeatureMap& x, int64_t n,
                                int64_t c_begin, int64_t c_end, int64_t h, int64_t w0,
                                int64_t columns, int64_t height) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(S));
  if (x.stride_w != 1) return;
  for (const ShiftedRun& run : runs) {
    const int64_t row = h + run.offset.dy;
    if (row < 0 || row >= height) continue;
    for (int64_t c = max64(c_begin, run.begin); c < min64(c_end, run.end); ++c)
      for (int64_t i = 0; i < columns; i += kLine)
        __builtin_prefetch(at<S>(x, n, c, row, w0 + i), 0, 2);
  }
}

// The transposed shift of a tile of gradients, into dx. Columns and rows of dx that no pixel maps
// to are written by fill_uncovered().
template <typename S, typename T>
void store_shifted(const ShiftedRuns& runs, const T* source, int64_t channel_stride,
                   int64_t row_stride, const FeatureMap& dx, const Tile& tile, int64_t height,
                   int64_t width) {
  for (const ShiftedRun& run : runs)
    store_tile<S>(source + run.begin * channel_stride, channel_stride, row_stride, dx, tile.n,
                  run.begin, run.end - run.begin, tile.h + run.offset.dy, tile.rows,
                  tile.w + run.offset.dx, tile.columns, height, width);
}

// dx at the border pixels that no output pixel of the shifted channel reads: zero, or the residual
// path's gradient where there is one.
template <typename S>
void fill_uncovered(const ShiftedRuns& runs, const FeatureMap& dx, const FeatureMap& residual_grad,
                    int64_t n, int64_t height, int64_t width) {
  const auto fill = [&](int64_t c, int64_t h, int64_t w) {
    S* element = at<S>(dx, n, c, h, w);
    if (residual_grad.data != nullptr)
      *element = *at<S>(residual_grad, n, c, h, w);
    else
      from_compute(typename Compute<S>::type(0), element);
  };
  for (const ShiftedRun& run : runs) {
    for (int64_t c = run.begin; c < run.end; ++c) {
      if (run.offset.dy != 0) {
        const int64_t h = run.offset.dy > 0 ? 0 : height - 1;
        for (int64_t w = 0; w < width; ++w) fill(c, h, w);
      }
      if (run.offset.dx != 0) {
        const int64_t w = run.offset.dx > 0 ? 0 : width - 1;
        for (int64_t h = 0; h < height; ++h) fill(c, h, w);
      }
    }
  }
}

constexpr int64_t kMaxColumns = 96;

// Columns of a product that one pass computes: its results stay in L1 until they are used.
constexpr int64_t kStripColumns = 64;

// A bias as compute elements; zeros where there is none. count elements of scratch.
template <typename S, typename T>
const T* load_bias(const void* bias, int64_t count, T* destination) {
  for (int64_t i = 0; i < count; ++i) destination[i] = T(0);
  if (bias != nullptr) load_elements(static_cast<const S*>(bias), 1, count, destination);
  return destination;
}

// ------------------------------------------------------------------ shift_conv2d

template <typename S>
void forward(ShiftConvParams p, ParallelFor parallel) {
  using T = typename Compute<S>::type;
  if (p.pattern == ShiftPattern::kNone) {
    const PixelRows rows(p.height, p.width, {&p.x, &p.residual, &p.y});
    p.height = rows.height, p.width = rows.width;
  }
  constexpr int64_t kTileColumns = StripRows<T>::kTileColumns;
  const Tiling tiling(p.batch, p.height, p.width, 4,
                      max64(1, run_length<T>(p.c_in + p.c_out) / kTileColumns) * kTileColumns,
                      kTileColumns);
  const int64_t stride = spread_stride<T>(padded<T>(tiling.columns));
  const ShiftedRuns runs(p.pattern, p.c_in, p.groups);
  const Activation activation = p.activation;
  const T slope = T(p.negative_slope);
  const bool residual = p.residual.data != nullptr;
  // Whether accumulators become y's rows directly.
  const bool direct =
      p.y.stride_w == 1 && fits_in_epilogue(activation) && (!residual || p.residual.stride_w == 1);

  Scratch shared(Scratch::bytes_for<T>(packed_size(p.c_out, p.c_in)) +
                 Scratch::bytes_for<T>(p.c_out));
  const T* weight = pack_tiles(static_cast<const S*>(p.weight), p.c_in, 1, p.c_out, p.c_in,
                               shared.take<T>(packed_size(p.c_out, p.c_in)));
  const T* bias = load_bias<S>(p.bias, p.c_out, shared.take<T>(p.c_out));

  parallel_for(parallel, tiling.count(), [&](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::bytes_for<T>(p.c_in * stride) +
                    (residual ? 2 : 1) * Scratch::bytes_for<T>(p.c_out * stride));
    T* x = scratch.take<T>(p.c_in * stride);
    T* y = scratch.take<T>(p.c_out * stride);
    T* r = residual ? scratch.take<T>(p.c_out * stride) : nullptr;
    const auto start = [&](int64_t m, int64_t, int i, int) { return broadcast(bias[m + i]); };
    const StridedRows<T> b{x, stride};
    for (int64_t index = begin; index < end; ++index) {
      const Tile t = tiling[index];
      const int64_t used = padded<T>(t.columns);
      const int64_t whole = direct ? t.columns / Simd<T>::width * Simd<T>::width : 0;
      for (int64_t h = t.h; h < t.h + t.rows; ++h) {
        load_shifted<S>(runs, p.x, t.n, h, 1, t.w, t.columns, p.height, p.width, x, stride, stride);
        S* y_row = at<S>(p.y, t.n, 0, h, t.w);
        const int64_t y_stride = p.y.stride_c, r_stride = p.residual.stride_c;
        if (residual) {
          const S* r_row = at<S>(p.residual, t.n, 0, h, t.w);
          tiled_product<T>(p.c_out, p.c_in, 0, whole, weight, b, start,
                           [&](int64_t m, int64_t column, int i, int j, Vec<T> v) {
                             v = activate_in_epilogue(activation, slope, v) +
                                 load_vector_of(r_row + (m + i) * r_stride + column + j);
                             store_vector_of(y_row + (m + i) * y_stride + column + j, v);
                           });
        } else {
          tiled_product<T>(p.c_out, p.c_in, 0, whole, weight, b, start,
                           [&](int64_t m, int64_t column, int i, int j, Vec<T> v) {
                             store_vector_of(y_row + (m + i) * y_stride + column + j,
                                             activate_in_epilogue(activation, slope, v));
                           });
        }
        if (whole == t.columns) continue;
        const int64_t rest = t.columns - whole, count = used - whole;
        tiled_product<T>(p.c_out, p.c_in, whole, used, weight, b, start,
                         [&](int64_t m, int64_t column, int i, int j, Vec<T> v) {
                           store<T>(y + (m + i) * stride + column + j, v);
                         });
        for (int64_t c = 0; c < p.c_out; ++c)
          activate_row(activation, slope, y + c * stride + whole, count);
        if (residual) {
          load_tile<S>(p.residual, t.n, 0, p.c_out, h, 1, t.w + whole, rest, p.height, p.width,
                       r + whole, stride, count);
          for (int64_t c = 0; c < p.c_out; ++c)
            for (int64_t i = whole; i < used; ++i) y[c * stride + i] += r[c * stride + i];
        }
        store_tile<S>(y + whole, stride, stride, p.y, t.n, 0, p.c_out, h, 1, t.w + whole, rest,
                      p.height, p.width);
      }
    }
  });
}

// Whether forward_in_place() can run, and its vectors along channels compute little twice. Not for
// portable code, nor where a panel of W leaves L1: see fits_pixels().
template <typename T>
bool fits_in_place(const ShiftConvParams& p) {
  const auto pixels = [](const FeatureMap& map) {
    return map.data == nullptr || (map.stride_c == 1 && map.stride_w != 1);
  };
  return p.pattern == ShiftPattern::kNone && fits_in_epilogue(p.activation) && pixels(p.x) &&
         pixels(p.residual) && pixels(p.y) && p.c_out >= Simd<T>::width && kVectorBytes >= 32 &&
         kPanelVectors * kVectorBytes * p.c_in <= int64_t{16} << 10 &&
         10 * Panels<T>(p.c_out).computed() <= 11 * p.c_out;
}

// A 1x1 convolution of channels_last maps without a transposition: pixels are read where they lie,
// and vectors run along channels.
template <typename T>
void forward_in_place(ShiftConvParams p, ParallelFor parallel) {
  const PixelRows rows(p.height, p.width, {&p.x, &p.residual, &p.y});
  const Tiling tiling(p.batch, rows.height, rows.width, 4, 4 * kStripColumns, kStripColumns);
  const int64_t size = Panels<T>(p.c_out).computed() * p.c_in;
  Scratch shared(Scratch::bytes_for<T>(size) + Scratch::bytes_for<T>(p.c_out));
  const T* weight = pack_panels(static_cast<const T*>(p.weight), 1, p.c_in, p.c_in, p.c_out,
                                shared.take<T>(size));
  const T* bias = load_bias<T>(p.bias, p.c_out, shared.take<T>(p.c_out));
  const Activation activation = p.activation;
  const T slope = T(p.negative_slope);
  const bool residual = p.residual.data != nullptr;
  parallel_for(parallel, tiling.count(), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const Tile t = tiling[index];
      for (int64_t h = t.h; h < t.h + t.rows; ++h) {
        const T* r = at<T>(p.residual, t.n, 0, h, t.w);
        T* y = at<T>(p.y, t.n, 0, h, t.w);
        pixel_product<T>(
            t.columns, p.c_in, p.c_out, at<T>(p.x, t.n, 0, h, t.w), p.x.stride_w, weight,
            [&](int64_t column) { return load(bias + column); },
            [&](int64_t m, int64_t column, Vec<T> v) {
              v = activate_in_epilogue(activation, slope, v);
              store<T>(y + m * p.y.stride_w + column,
                       residual ? v + load(r + m * p.residual.stride_w + column) : v);
            });
      }
    }
  });
}

template <typename S>
void backward(ShiftConvBackwardParams params, ParallelFor parallel) {
  using T = typename Compute<S>::type;
  ShiftConvParams& p = params.forward;
  if (p.pattern == ShiftPattern::kNone) {
    const PixelRows rows(p.height, p.width, {&p.x, &params.grad, &params.dx});
    p.height = rows.height, p.width = rows.width;
  }
  // Whole register tiles and lines of the cache wherever a tile does not end the row.
  constexpr int64_t kWhole = StripRows<T>::kTileColumns;
  const int64_t max_columns = (p.height == 1 ? 4 : 1) * (kMaxColumns / kWhole) * kWhole;
  const Tiling tiling(p.batch, p.height, p.width, 4, max_columns, kWhole);
  const int64_t stride = padded<T>(tiling.columns);
  const int64_t pixels = spread_stride<T>(tiling.rows * stride);  // a channel's row of a tile
  const ShiftedRuns runs(p.pattern, p.c_in, p.groups);
  const bool want_dx = params.dx.data != nullptr, want_dw = params.dweight != nullptr;
  const bool want_db = params.dbias != nullptr;
  const bool recompute = p.activation != Activation::kNone;
  const Chunks chunks(tiling.count());
  const int64_t chunk_size = p.c_out * p.c_in + p.c_out;  // dW, then db

  Scratch shared(2 * Scratch::bytes_for<T>(packed_size(p.c_out, p.c_in)) +
                 Scratch::bytes_for<T>(packed_size(p.c_in, p.c_out)) +
                 Scratch::bytes_for<T>(p.c_out) + Scratch::bytes_for<T>(chunks.count * chunk_size));
  const S* w = static_cast<const S*>(p.weight);
  const LeftOperand<T> weight =
      pack(w, p.c_in, 1, p.c_out, p.c_in, shared.take<T>(packed_size(p.c_out, p.c_in)));
  const T* weight_transposed =
      pack_tiles(w, 1, p.c_in, p.c_in, p.c_out, shared.take<T>(packed_size(p.c_in, p.c_out)));
  const auto zero = [](int64_t, int64_t, int, int) { return Vec<T>{}; };
  // Whether accumulators become dx's rows directly.
  const bool direct =
      p.pattern == ShiftPattern::kNone && tiling.rows == 1 && params.dx.stride_w == 1;
  const T* bias = load_vector<S>(p.bias, p.c_out, shared.take<T>(p.c_out));
  T* partial = shared.take<T>(chunks.count * chunk_size);

  if (want_dx)
    parallel_for(parallel, p.batch, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        fill_uncovered<S>(runs, params.dx, FeatureMap{}, n, p.height, p.width);
    });
  const int64_t bytes =
      2 * Scratch::bytes_for<T>(p.c_in * pixels) + 2 * Scratch::bytes_for<T>(p.c_out * pixels);
  parallel_for_scratch(
      parallel, chunks.count, bytes, [&](Scratch& scratch, int64_t begin, int64_t end) {
        T* x = scratch.take<T>(p.c_in * pixels);
        T* dx = scratch.take<T>(p.c_in * pixels);
        T* z = scratch.take<T>(p.c_out * pixels);
        T* dz = scratch.take<T>(p.c_out * pixels);
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          T* dw_sum = partial + chunk * chunk_size;
          T* db_sum = dw_sum + p.c_out * p.c_in;
          for (int64_t index = chunks.begin(chunk); index < chunks.end(chunk); ++index) {
            const Tile t = tiling[index];
            const int64_t used = t.rows * stride;
            load_tile<S>(params.grad, t.n, 0, p.c_out, t.h, t.rows, t.w, t.columns, p.height,
                         p.width, dz, pixels, stride);
            if (recompute || want_dw)
              load_shifted<S>(runs, p.x, t.n, t.h, t.rows, t.w, t.columns, p.height, p.width, x,
                              pixels, stride);
            if (recompute) {
              product(bias != nullptr ? Start::kBias : Start::kZero, p.c_out, p.c_in, used, weight,
                      StridedRows<T>{x, pixels}, bias, z, pixels);
              for (int64_t c = 0; c < p.c_out; ++c)
                multiply_by_derivative(p.activation, T(p.negative_slope), z + c * pixels,
                                       dz + c * pixels, used);
            }
            if (want_dw)
              accumulate_inner_products(p.c_out, p.c_in, used, StridedRows<T>{dz, pixels},
                                        StridedRows<T>{x, pixels}, dw_sum, p.c_in);
            if (want_db) accumulate_row_sums(p.c_out, used, StridedRows<T>{dz, pixels}, db_sum);
            if (want_dx) {
              const StridedRows<T> b{dz, pixels};
              const int64_t whole = direct ? t.columns / Simd<T>::width * Simd<T>::width : 0;
              S* dx_row = at<S>(params.dx, t.n, 0, t.h, t.w);
              tiled_product<T>(p.c_in, p.c_out, 0, whole, weight_transposed, b, zero,
                               [&](int64_t m, int64_t column, int i, int j, Vec<T> v) {
                                 store_vector_of(dx_row + (m + i) * params.dx.stride_c + column + j,
                                                 v);
                               });
              if (whole == t.columns) continue;
              tiled_product<T>(p.c_in, p.c_out, whole, used, weight_transposed, b, zero,
                               [&](int64_t m, int64_t column, int i, int j, Vec<T> v) {
                                 store<T>(dx + (m + i) * pixels + column + j, v);
                               });
              Tile rest = t;
              rest.w += whole, rest.columns -= whole;
              store_shifted<S>(runs, dx + whole, pixels, stride, params.dx, rest, p.height,
                               p.width);
            }
          }
        }
      });
  if (want_dw)
    reduce_chunks(partial, chunks.count, chunk_size, p.c_out * p.c_in,
                  static_cast<S*>(params.dweight));
  if (want_db)
    reduce_chunks(partial + p.c_out * p.c_in, chunks.count, chunk_size, p.c_out,
                  static_cast<S*>(params.dbias));
}

// ------------------------------------------------------------------ shift_conv_block

// A hidden value is read by one output pixel only, since the shift moves each channel as a whole.
// So row h of the output takes exactly c_hidden x width hidden values: hidden channel c at
// (h + dy(c), w + dx(c)), where the second shift reads. Nothing is computed twice, and hidden
// values exist for one strip of pixels at a time. What has a halo is shift(x), one pixel: three
// rows of it in a ring, in which the second shift is one offset for a whole product. The residual
// is in the ring too, where the first shift took it.
template <typename S>
void block_forward(const ShiftConvBlockParams& p, ParallelFor parallel) {
  using T = typename Compute<S>::type;
  using Strip = StripRows<T>;
  constexpr int64_t kTileColumns = Strip::kTileColumns, kHalo = 1, kRing = 3;
  static_assert(kStripColumns % kTileColumns == 0, "strips are whole register tiles");
  // The ring is about 128 KiB: with both weights and a strip it stays in L2.
  const int64_t fit = (int64_t{128} << 10) / (kRing * p.c_in * static_cast<int64_t>(sizeof(T)));
  const int64_t bands = max64(1, ceil_div(p.height, 32));
  const Tiling tiling(p.batch, p.height, p.width, ceil_div(p.height, bands),
                      max64(1, min64(4, fit / kStripColumns)) * kStripColumns, kTileColumns);
  const int64_t x_stride = spread_stride<T>(padded<T>(tiling.columns) + 2 * kHalo);
  const int64_t slot = p.c_in * x_stride;
  const ShiftedRuns runs_in(p.pattern, p.c_in, p.groups);
  const ShiftedRuns runs_hidden(p.pattern, p.c_hidden, p.groups);
  const bool direct = p.y.stride_w == 1;  // y's rows are written from registers

  int64_t w0_size = 0;  // packed run by run: each run reads shift(x) at a place of its own
  for (const ShiftedRun& run : runs_hidden) w0_size += packed_size(run.end - run.begin, p.c_in);
  Scratch shared(Scratch::bytes_for<T>(w0_size) +
                 Scratch::bytes_for<T>(packed_size(p.c_out, p.c_hidden)) +
                 Scratch::bytes_for<T>(p.c_hidden) + Scratch::bytes_for<T>(p.c_out));
  const T* w0[5];
  {
    T* panels = shared.take<T>(w0_size);
    for (int i = 0; i < runs_hidden.count; ++i) {
      const ShiftedRun& run = runs_hidden.run[i];
      w0[i] = pack_tiles(static_cast<const S*>(p.w0) + run.begin * p.c_in, p.c_in, 1,
                         run.end - run.begin, p.c_in, panels);
      panels += packed_size(run.end - run.begin, p.c_in);
    }
  }
  const T* w1 = pack_tiles(static_cast<const S*>(p.w1), p.c_hidden, 1, p.c_out, p.c_hidden,
                           shared.take<T>(packed_size(p.c_out, p.c_hidden)));
  const T* b0 = load_bias<S>(p.b0, p.c_hidden, shared.take<T>(p.c_hidden));
  const T* b1 = load_bias<S>(p.b1, p.c_out, shared.take<T>(p.c_out));
  const Activation activation = p.activation;
  const T slope = T(p.negative_slope);
  const bool residual = p.residual;

  parallel_for(parallel, tiling.count(), [&](int64_t begin, int64_t end) {
    Scratch scratch(
        Scratch::bytes_for<T>(kRing * slot) + Scratch::bytes_for<T>(p.c_hidden * kStripColumns) +
        Scratch::bytes_for<T>(p.c_out * kStripColumns) + Scratch::bytes_for<const T*>(p.c_in));
    T* ring = scratch.take<T>(kRing * slot);
    T* hidden = scratch.take<T>(p.c_hidden * kStripColumns);
    T* y = scratch.take<T>(p.c_out * kStripColumns);
    const T** unshifted = scratch.take<const T*>(p.c_in);
    for (int64_t index = begin; index < end; ++index) {
      const Tile t = tiling[index];
      const int64_t parts = ceil_div(t.columns, kStripColumns) * runs_hidden.count;
      const auto ring_row = [&](int64_t r) { return ring + (r + kHalo) % kRing * slot + kHalo; };
      for (int64_t r = -kHalo; r < t.rows + kHalo; ++r) {
        load_shifted<S>(runs_in, p.x, t.n, t.h + r, 1, t.w - kHalo, t.columns + 2 * kHalo, p.height,
                        p.width, ring_row(r) - kHalo, x_stride, x_stride);
        const int64_t out = r - kHalo, h = t.h + out;  // the row of y that is now possible
        if (out < 0) continue;
        for (const ShiftedRun& run : runs_in)
          for (int64_t c = run.begin; c < run.end; ++c)
            unshifted[c] = ring_row(out - run.offset.dy) + c * x_stride - run.offset.dx;
        for (int64_t w = 0; w < t.columns; w += kStripColumns) {
          const int64_t columns = min64(kStripColumns, t.columns - w), used = padded<T>(columns);
          const auto hidden_at = [&](int64_t c, int64_t column) {
            return hidden + Strip::offset(p.c_hidden, column) + c * kTileColumns;
          };
          for (int i = 0; i < runs_hidden.count; ++i) {
            const ShiftedRun& run = runs_hidden.run[i];
            if (r + 1 < t.rows + kHalo) {  // the ring's next row, on its way while this one is used
              const int64_t part = w / kStripColumns * runs_hidden.count + i;
              prefetch_shifted<S>(runs_in, p.x, t.n, p.c_in * part / parts,
                                  p.c_in * (part + 1) / parts, t.h + r + 1, t.w, t.columns,
                                  p.height);
            }
            if (h + run.offset.dy < 0 || h + run.offset.dy >= p.height) continue;
            const T* source = ring_row(out + run.offset.dy) + run.offset.dx + w;
            tiled_product<T>(
                run.end - run.begin, p.c_in, 0, used, w0[i], StridedRows<T>{source, x_stride},
                [&](int64_t m, int64_t, int i, int) { return broadcast(b0[run.begin + m + i]); },
                [&](int64_t m, int64_t column, int i, int j, Vec<T> v) {
                  store<T>(hidden_at(run.begin + m, column) + i * kTileColumns + j,
                           activate_in_epilogue(activation, slope, v));
                });
          }
          if (!fits_in_epilogue(activation))
            activate_row(activation, slope, hidden,
                         ceil_div(used, kTileColumns) * kTileColumns * p.c_hidden);
          // The second convolution's zero fill.
          for (const ShiftedRun& run : runs_hidden) {
            const int64_t first = t.w + w + run.offset.dx, last = first + columns - 1;
            const bool row_outside = h + run.offset.dy < 0 || h + run.offset.dy >= p.height;
            for (int64_t i = 0; i < columns; i = row_outside ? i + 1 : i + max64(1, columns - 1))
              if (row_outside || (i == 0 && first < 0) || (i == columns - 1 && last >= p.width))
                for (int64_t c = run.begin; c < run.end; ++c) *hidden_at(c, i) = T(0);
          }
          // The residual comes last: a sum that starts from it would round at its magnitude, which
          // is several times that of the products.
          const auto start = [&](int64_t m, int64_t, int i, int) { return broadcast(b1[m + i]); };
          const auto add_residual = [&](int64_t m, int64_t column, int i, int j, Vec<T> v) {
            return residual ? v + load(unshifted[m + i] + w + column + j) : v;
          };
          const Strip b{hidden, p.c_hidden};
          const int64_t whole = direct ? columns / Simd<T>::width * Simd<T>::width : 0;
          S* y_row = at<S>(p.y, t.n, 0, h, t.w + w);
          const int64_t y_stride = p.y.stride_c;
          tiled_product<T>(p.c_out, p.c_hidden, 0, whole, w1, b, start,
                           [&](int64_t m, int64_t column, int i, int j, Vec<T> v) {
                             store_vector_of(y_row + (m + i) * y_stride + column + j,
                                             add_residual(m, column, i, j, v));
                           });
          if (whole == columns) continue;
          tiled_product<T>(p.c_out, p.c_hidden, whole, used, w1, b, start,
                           [&](int64_t m, int64_t column, int i, int j, Vec<T> v) {
                             store<T>(y + (m + i) * kStripColumns + column + j,
                                      add_residual(m, column, i, j, v));
                           });
          store_tile<S>(y + whole, kStripColumns, kStripColumns, p.y, t.n, 0, p.c_out, h, 1,
                        t.w + w + whole, columns - whole, p.height, p.width);
        }
      }
    }
  });
}

// Whether block_forward_pixels() can run, its vectors along channels compute little twice, and a
// panel of W1 stays in L1: at C = 180 it does not, which costs 4 to 8 % where 60 gains 7 (Zen 3).
// Not for portable code, whose products need a register more: 3 to 5 % slower.
template <typename T>
bool fits_pixels(const ShiftConvBlockParams& p) {
  const auto pixels = [](const FeatureMap& map) { return map.stride_c == 1 && map.stride_w != 1; };
  constexpr int W = Simd<T>::width;
  if (!pixels(p.x) || !pixels(p.y) || p.c_out < W) return false;
  if (kVectorBytes < 32 || kPanelVectors * kVectorBytes * p.c_hidden > int64_t{16} << 10)
    return false;
  int64_t computed = Panels<T>(p.c_out).computed() * p.c_hidden;
  for (const ShiftedRun& run : ShiftedRuns(p.pattern, p.c_hidden, p.groups)) {
    if (run.end - run.begin < W) return false;
    computed += Panels<T>(run.end - run.begin).computed() * p.c_in;
  }
  return 20 * computed <= 21 * p.c_hidden * (p.c_in + p.c_out);
}

// shift(x) at columns [w0, w0 + columns) of row h0: destination[i * channels + c].
template <typename T>
void load_shifted_pixels(const ShiftedRuns& runs, const FeatureMap& x, int64_t n, int64_t channels,
                         int64_t h0, int64_t w0, int64_t columns, int64_t height, int64_t width,
                         T* destination) {
  constexpr int W = Simd<T>::width;
  for (const ShiftedRun& run : runs) {
    const int64_t h = h0 + run.offset.dy, w = w0 + run.offset.dx, count = run.end - run.begin;
    const bool inside = h >= 0 && h < height;
    const int64_t first = inside ? min64(max64(0, -w), columns) : columns;
    const int64_t last = max64(first, min64(columns, width - w));
    T* target = destination + run.begin;
    const auto clear = [&](int64_t i0, int64_t i1) {
      for (int64_t i = i0; i < i1; ++i)
        for (int64_t c = 0; c < count; ++c) target[i * channels + c] = T(0);
    };
    clear(0, first);
    clear(last, columns);
    if (first == last) continue;
    const int64_t step = x.stride_w;
    const T* source = at<T>(x, n, run.begin, h, w);
    if (count >= W && count <= 2 * W) {  // two vectors that overlap
      for (int64_t i = first; i < last; ++i) {
        const Vec<T> head = load(source + i * step), tail = load(source + i * step + count - W);
        store<T>(target + i * channels, head);
        store<T>(target + i * channels + count - W, tail);
      }
    } else {
      for (int64_t i = first; i < last; ++i)
        std::memcpy(target + i * channels, source + i * step,
                    static_cast<size_t>(count) * sizeof(T));
    }
  }
}

// block_forward() for channels_last maps without a transposition: in the ring, in the hidden values
// and in y the channels of a pixel lie side by side, and the residual is read from x.
template <typename T>
void block_forward_pixels(const ShiftConvBlockParams& p, ParallelFor parallel) {
  constexpr int64_t kHalo = 1, kRing = 3, kStrip = kStripColumns;
  const int64_t fit = (int64_t{128} << 10) / (kRing * p.c_in * static_cast<int64_t>(sizeof(T)));
  const int64_t bands = max64(1, ceil_div(p.height, 32));
  const Tiling tiling(p.batch, p.height, p.width, ceil_div(p.height, bands),
                      max64(1, min64(4, fit / kStrip)) * kStrip, kStrip);
  const int64_t slot = p.c_in * (tiling.columns + 2 * kHalo);
  const ShiftedRuns runs_in(p.pattern, p.c_in, p.groups);
  const ShiftedRuns runs_hidden(p.pattern, p.c_hidden, p.groups);

  int64_t w0_size = 0;
  for (const ShiftedRun& run : runs_hidden)
    w0_size += Panels<T>(run.end - run.begin).computed() * p.c_in;
  const int64_t w1_size = Panels<T>(p.c_out).computed() * p.c_hidden;
  Scratch shared(Scratch::bytes_for<T>(w0_size) + Scratch::bytes_for<T>(w1_size) +
                 Scratch::bytes_for<T>(p.c_hidden) + Scratch::bytes_for<T>(p.c_out));
  const T* w0[5];
  {
    T* panels = shared.take<T>(w0_size);
    for (int i = 0; i < runs_hidden.count; ++i) {
      const ShiftedRun& run = runs_hidden.run[i];
      w0[i] = pack_panels(static_cast<const T*>(p.w0) + run.begin * p.c_in, 1, p.c_in, p.c_in,
                          run.end - run.begin, panels);
      panels += Panels<T>(run.end - run.begin).computed() * p.c_in;
    }
  }
  const T* w1 = pack_panels(static_cast<const T*>(p.w1), 1, p.c_hidden, p.c_hidden, p.c_out,
                            shared.take<T>(w1_size));
  const T* b0 = load_bias<T>(p.b0, p.c_hidden, shared.take<T>(p.c_hidden));
  const T* b1 = load_bias<T>(p.b1, p.c_out, shared.take<T>(p.c_out));
  const Activation activation = p.activation;
  const T slope = T(p.negative_slope);
  const bool residual = p.residual;

  parallel_for(parallel, tiling.count(), [&](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::bytes_for<T>(kRing * slot) +
                    Scratch::bytes_for<T>(p.c_hidden * kStrip));
    T* ring = scratch.take<T>(kRing * slot);
    T* hidden = scratch.take<T>(p.c_hidden * kStrip);
    for (int64_t index = begin; index < end; ++index) {
      const Tile t = tiling[index];
      const auto ring_row = [&](int64_t r) {
        return ring + (r + kHalo) % kRing * slot + kHalo * p.c_in;
      };
      for (int64_t r = -kHalo; r < t.rows + kHalo; ++r) {
        load_shifted_pixels(runs_in, p.x, t.n, p.c_in, t.h + r, t.w - kHalo, t.columns + 2 * kHalo,
                            p.height, p.width, ring_row(r) - kHalo * p.c_in);
        const int64_t out = r - kHalo, h = t.h + out;  // the row of y that is now possible
        if (out < 0) continue;
        for (int64_t w = 0; w < t.columns; w += kStrip) {
          const int64_t columns = min64(kStrip, t.columns - w);
          for (int i = 0; i < runs_hidden.count; ++i) {
            const ShiftedRun& run = runs_hidden.run[i];
            const int64_t row = h + run.offset.dy, column0 = t.w + w + run.offset.dx;
            const auto clear = [&](int64_t first, int64_t last) {  // the second zero fill
              for (int64_t m = first; m < last; ++m)
                for (int64_t c = run.begin; c < run.end; ++c) hidden[m * p.c_hidden + c] = T(0);
            };
            if (row < 0 || row >= p.height) {
              clear(0, columns);
              continue;
            }
            const T* source = ring_row(out + run.offset.dy) + (w + run.offset.dx) * p.c_in;
            T* target = hidden + run.begin;
            pixel_product<T>(
                columns, p.c_in, run.end - run.begin, source, p.c_in, w0[i],
                [&](int64_t column) { return load(b0 + run.begin + column); },
                [&](int64_t m, int64_t column, Vec<T> v) {
                  store<T>(target + m * p.c_hidden + column,
                           activate_in_epilogue(activation, slope, v));
                });
            if (column0 < 0) clear(0, 1);
            if (column0 + columns > p.width) clear(columns - 1, columns);
          }
          if (!fits_in_epilogue(activation))
            activate_row(activation, slope, hidden, padded<T>(columns * p.c_hidden));
          const T* x = at<T>(p.x, t.n, 0, h, t.w + w);
          T* y = at<T>(p.y, t.n, 0, h, t.w + w);
          pixel_product<T>(
              columns, p.c_hidden, p.c_out, hidden, p.c_hidden, w1,
              [&](int64_t column) { return load(b1 + column); },
              [&](int64_t m, int64_t column, Vec<T> v) {
                store<T>(y + m * p.y.stride_w + column,
                         residual ? v + load(x + m * p.x.stride_w + column) : v);
              });
        }
      }
    }
  });
}

// The same where nothing moves, as in a transformer's MLP: pixels in any order, read where they
// lie.
template <typename T>
void block_forward_in_place(ShiftConvBlockParams p, ParallelFor parallel) {
  const PixelRows rows(p.height, p.width, {&p.x, &p.y});
  constexpr int64_t kStrip = 32;  // pixels whose hidden values stay in L1
  const Tiling tiling(p.batch, rows.height, rows.width, 4, 8 * kStrip, kStrip);
  const int64_t w0_size = Panels<T>(p.c_hidden).computed() * p.c_in;
  const int64_t w1_size = Panels<T>(p.c_out).computed() * p.c_hidden;
  Scratch shared(Scratch::bytes_for<T>(w0_size) + Scratch::bytes_for<T>(w1_size) +
                 Scratch::bytes_for<T>(p.c_hidden) + Scratch::bytes_for<T>(p.c_out));
  const T* w0 = pack_panels(static_cast<const T*>(p.w0), 1, p.c_in, p.c_in, p.c_hidden,
                            shared.take<T>(w0_size));
  const T* w1 = pack_panels(static_cast<const T*>(p.w1), 1, p.c_hidden, p.c_hidden, p.c_out,
                            shared.take<T>(w1_size));
  const T* b0 = load_bias<T>(p.b0, p.c_hidden, shared.take<T>(p.c_hidden));
  const T* b1 = load_bias<T>(p.b1, p.c_out, shared.take<T>(p.c_out));
  const Activation activation = p.activation;
  const T slope = T(p.negative_slope);
  const bool residual = p.residual;

  parallel_for(parallel, tiling.count(), [&](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::bytes_for<T>(p.c_hidden * kStrip));
    T* hidden = scratch.take<T>(p.c_hidden * kStrip);
    for (int64_t index = begin; index < end; ++index) {
      const Tile t = tiling[index];
      for (int64_t h = t.h; h < t.h + t.rows; ++h)
        for (int64_t w = t.w; w < t.w + t.columns; w += kStrip) {
          const int64_t columns = min64(kStrip, t.w + t.columns - w);
          const T* x = at<T>(p.x, t.n, 0, h, w);
          T* y = at<T>(p.y, t.n, 0, h, w);
          pixel_product<T>(
              columns, p.c_in, p.c_hidden, x, p.x.stride_w, w0,
              [&](int64_t column) { return load(b0 + column); },
              [&](int64_t m, int64_t column, Vec<T> v) {
                store<T>(hidden + m * p.c_hidden + column,
                         activate_in_epilogue(activation, slope, v));
              });
          if (!fits_in_epilogue(activation))
            activate_row(activation, slope, hidden, padded<T>(columns * p.c_hidden));
          pixel_product<T>(
              columns, p.c_hidden, p.c_out, hidden, p.c_hidden, w1,
              [&](int64_t column) { return load(b1 + column); },
              [&](int64_t m, int64_t column, Vec<T> v) {
                store<T>(y + m * p.y.stride_w + column,
                         residual ? v + load(x + m * p.x.stride_w + column) : v);
              });
        }
    }
  });
}

template <typename T>
T sum_of(const T* values, int64_t count) {
  Vec<T> sum{};
  int64_t i = 0;
  for (; i + Simd<T>::width <= count; i += Simd<T>::width) sum += load(values + i);
  T total = horizontal_sum<T>(sum);
  for (; i < count; ++i) total += values[i];
  return total;
}

// With h = act(z), z = W0 S(x) + b0 and y = W1 S(h) + b1 (+ x):
//   dh = S^T(W1^T grad)     dz = dh * act'(z)     dx = S^T(W0^T dz) (+ grad)
//   dW1[o, c] = sum_p grad[o, p - offset(c)] h[c, p]     dW0 = dz S(x)^T
// Every sum runs over the pixels p of a tile of the hidden map, so only grad needs a halo.
template <typename S>
void block_backward(const ShiftConvBlockBackwardParams& params, ParallelFor parallel) {
  using T = typename Compute<S>::type;
  const ShiftConvBlockParams& p = params.forward;
  const Tiling tiling(p.batch, p.height, p.width, 8, kMaxColumns - 2);
  // All tiles share one row stride, that of the haloed gradient, so that a shift is one offset in
  // a flat run of rows. Where a tile is as wide as the image, the zero to the right of a row is
  // also the one to the left of the next. Pixels beyond a row's end, and beyond the last row, are
  // kept zero.
  const int64_t stride = tiling.columns + (tiling.tiles_w == 1 ? 1 : 2);
  const int64_t pixels = padded<T>(tiling.rows * stride);
  const int64_t halo_pixels = padded<T>(pixels + 2 * stride + 2);
  const ShiftedRuns runs_in(p.pattern, p.c_in, p.groups);
  const ShiftedRuns runs_hidden(p.pattern, p.c_hidden, p.groups);
  const bool want_dx = params.dx.data != nullptr;
  const bool want_dw0 = params.dw0 != nullptr, want_db0 = params.db0 != nullptr;
  const bool want_dw1 = params.dw1 != nullptr, want_db1 = params.db1 != nullptr;
  const bool want_dz = want_dx || want_dw0 || want_db0;
  const auto zero = [](int64_t, int64_t, int, int) { return Vec<T>{}; };
  const Chunks chunks(tiling.count());
  const int64_t dw0_size = p.c_hidden * p.c_in, dw1_size = p.c_out * p.c_hidden;
  const int64_t chunk_size = dw0_size + dw1_size + p.c_hidden + p.c_out;

  int64_t w1_panels = 0;  // W1^T is packed run by run: its rows' shifts differ
  for (const ShiftedRun& run : runs_hidden) w1_panels += packed_size(run.end - run.begin, p.c_out);
  Scratch shared(Scratch::bytes_for<T>(packed_size(p.c_hidden, p.c_in)) +
                 Scratch::bytes_for<T>(packed_size(p.c_in, p.c_hidden)) +
                 Scratch::bytes_for<T>(w1_panels) + Scratch::bytes_for<T>(p.c_hidden) +
                 Scratch::bytes_for<T>(p.c_out) + Scratch::bytes_for<T>(chunks.count * chunk_size));
  const S* w0_source = static_cast<const S*>(p.w0);
  const T* w0 = pack_tiles(w0_source, p.c_in, 1, p.c_hidden, p.c_in,
                           shared.take<T>(packed_size(p.c_hidden, p.c_in)));
  const T* w0_transposed = pack_tiles(w0_source, 1, p.c_in, p.c_in, p.c_hidden,
                                      shared.take<T>(packed_size(p.c_in, p.c_hidden)));
  const T* w1_transposed[5];
  {
    T* panels = shared.take<T>(w1_panels);
    for (int i = 0; i < runs_hidden.count; ++i) {
      const ShiftedRun& run = runs_hidden.run[i];
      w1_transposed[i] = pack_tiles(static_cast<const S*>(p.w1) + run.begin, 1, p.c_hidden,
                                    run.end - run.begin, p.c_out, panels);
      panels += packed_size(run.end - run.begin, p.c_out);
    }
  }
  const T* b0 = load_bias<S>(p.b0, p.c_hidden, shared.take<T>(p.c_hidden));
  T* partial = shared.take<T>(chunks.count * chunk_size);

  if (want_dx)
    parallel_for(parallel, p.batch, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        fill_uncovered<S>(runs_in, params.dx, p.residual ? params.grad : FeatureMap{}, n, p.height,
                          p.width);
    });
  const int64_t bytes = Scratch::bytes_for<T>(p.c_in * pixels) +
                        Scratch::bytes_for<T>(max64(p.c_in, p.c_hidden) * pixels) +
                        Scratch::bytes_for<T>(p.c_hidden * pixels) +
                        Scratch::bytes_for<T>(p.c_out * halo_pixels) +
                        Scratch::bytes_for<const T*>(p.c_in);
  parallel_for_scratch(
      parallel, chunks.count, bytes, [&](Scratch& scratch, int64_t begin, int64_t end) {
        T* x = scratch.take<T>(p.c_in * pixels);
        T* z = scratch.take<T>(max64(p.c_in, p.c_hidden) * pixels);  // then h, then dx
        T* dz = scratch.take<T>(p.c_hidden * pixels);
        T* grad = scratch.take<T>(p.c_out * halo_pixels);
        const T** direct = scratch.take<const T*>(p.c_in);
        // The residual's gradient at the target pixel: p + offset, in the haloed tile.
        if (p.residual)
          for (const ShiftedRun& run : runs_in)
            for (int64_t c = run.begin; c < run.end; ++c)
              direct[c] = grad + c * halo_pixels + (1 + run.offset.dy) * stride + 1 + run.offset.dx;
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          T* dw0_sum = partial + chunk * chunk_size;
          T* dw1_sum = dw0_sum + dw0_size;  // transposed: (c_hidden, c_out)
          T* db0_sum = dw1_sum + dw1_size;
          T* db1_sum = db0_sum + p.c_hidden;
          for (int64_t index = chunks.begin(chunk); index < chunks.end(chunk); ++index) {
            const Tile t = tiling[index];
            const int64_t used = padded<T>(t.rows * stride);
            load_tile<S>(params.grad, t.n, 0, p.c_out, t.h - 1, t.rows + 2, t.w - 1, t.columns + 2,
                         p.height, p.width, grad, halo_pixels, stride);
            load_shifted<S>(runs_in, p.x, t.n, t.h, t.rows, t.w, t.columns, p.height, p.width, x,
                            pixels, stride);
            tiled_product<T>(
                p.c_hidden, p.c_in, 0, used, w0, StridedRows<T>{x, pixels},
                [&](int64_t m, int64_t, int i, int) { return broadcast(b0[m + i]); },
                [&](int64_t m, int64_t column, int i, int j, Vec<T> v) {
                  store<T>(z + (m + i) * pixels + column + j, v);
                });
            // grad[o, p - offset] for hidden pixel p, as a flat offset into the haloed tile
            const auto grad_at = [&](const ShiftedRun& run) {
              return StridedRows<T>{grad + (1 - run.offset.dy) * stride + (1 - run.offset.dx),
                                    halo_pixels};
            };
            for (int i = 0; want_dz && i < runs_hidden.count; ++i) {
              const ShiftedRun& run = runs_hidden.run[i];
              T* rows = dz + run.begin * pixels;
              tiled_product<T>(run.end - run.begin, p.c_out, 0, used, w1_transposed[i],
                               grad_at(run), zero,
                               [&](int64_t m, int64_t column, int i, int j, Vec<T> v) {
                                 store<T>(rows + (m + i) * pixels + column + j, v);
                               });
            }
            // Padding must not add to the sums.
            const auto clear_padding = [&](T* row) {
              for (int64_t r = 0; r < t.rows; ++r)
                for (int64_t i = t.columns; i < stride; ++i) row[r * stride + i] = T(0);
              for (int64_t i = t.rows * stride; i < used; ++i) row[i] = T(0);
            };
            for (int64_t c = 0; c < p.c_hidden; ++c) {
              T *z_row = z + c * pixels, *dz_row = dz + c * pixels;
              if (want_dz) {
                multiply_by_derivative(p.activation, T(p.negative_slope), z_row, dz_row, used);
                clear_padding(dz_row);
              }
              if (want_dw1) {
                activate_row(p.activation, T(p.negative_slope), z_row, used);
                clear_padding(z_row);
              }
            }
            if (want_dw1)
              for (const ShiftedRun& run : runs_hidden)
                accumulate_inner_products(run.end - run.begin, p.c_out, used,
                                          StridedRows<T>{z + run.begin * pixels, pixels},
                                          grad_at(run), dw1_sum + run.begin * p.c_out, p.c_out);
            if (want_db1)
              for (int64_t o = 0; o < p.c_out; ++o)
                for (int64_t r = 0; r < t.rows; ++r)
                  db1_sum[o] += sum_of(grad + o * halo_pixels + (r + 1) * stride + 1, t.columns);
            if (want_dw0)
              accumulate_inner_products(p.c_hidden, p.c_in, used, StridedRows<T>{dz, pixels},
                                        StridedRows<T>{x, pixels}, dw0_sum, p.c_in);
            if (want_db0)
              accumulate_row_sums(p.c_hidden, used, StridedRows<T>{dz, pixels}, db0_sum);
            if (want_dx) {
              T* dx = z;
              tiled_product<T>(p.c_in, p.c_hidden, 0, used, w0_transposed,
                               StridedRows<T>{dz, pixels}, zero,
                               [&](int64_t m, int64_t column, int i, int j, Vec<T> v) {
                                 store<T>(dx + (m + i) * pixels + column + j,
                                          p.residual ? v + load(direct[m + i] + column + j) : v);
                               });
              store_shifted<S>(runs_in, dx, pixels, stride, params.dx, t, p.height, p.width);
            }
          }
        }
      });
  if (want_dw0)
    reduce_chunks(partial, chunks.count, chunk_size, dw0_size, static_cast<S*>(params.dw0));
  if (want_dw1) {
    // (c_hidden, c_out) sums -> (c_out, c_hidden) weights
    S* dw1 = static_cast<S*>(params.dw1);
    T* row = shared.take<T>(p.c_out);
    for (int64_t c = 0; c < p.c_hidden; ++c) {
      reduce_chunks(partial + dw0_size + c * p.c_out, chunks.count, chunk_size, p.c_out, row);
      for (int64_t o = 0; o < p.c_out; ++o) from_compute(row[o], dw1 + o * p.c_hidden + c);
    }
  }
  if (want_db0)
    reduce_chunks(partial + dw0_size + dw1_size, chunks.count, chunk_size, p.c_hidden,
                  static_cast<S*>(params.db0));
  if (want_db1)
    reduce_chunks(partial + dw0_size + dw1_size + p.c_hidden, chunks.count, chunk_size, p.c_out,
                  static_cast<S*>(params.db1));
}

}  // namespace

void shift_conv2d(const ShiftConvParams& params, ParallelFor parallel) {
  dispatch_scalar(params.kind, [&](auto element) {
    using S = decltype(element);
    if constexpr (std::is_same_v<S, typename Compute<S>::type>) {
      if (fits_in_place<S>(params)) return forward_in_place<S>(params, parallel);
    }
    forward<S>(params, parallel);
  });
}
void shift_conv2d_backward(const ShiftConvBackwardParams& params, ParallelFor parallel) {
  dispatch_scalar(params.forward.kind,
                  [&](auto element) { backward<decltype(element)>(params, parallel); });
}
void shift_conv_block(const ShiftConvBlockParams& params, ParallelFor parallel) {
  dispatch_scalar(params.kind, [&](auto element) {
    using S = decltype(element);
    if constexpr (std::is_same_v<S, typename Compute<S>::type>) {
      if (fits_pixels<S>(params))
        return params.pattern == ShiftPattern::kNone ? block_forward_in_place<S>(params, parallel)
                                                     : block_forward_pixels<S>(params, parallel);
    }
    block_forward<S>(params, parallel);
  });
}
void shift_conv_block_backward(const ShiftConvBlockBackwardParams& params, ParallelFor parallel) {
  dispatch_scalar(params.forward.kind,
                  [&](auto element) { block_backward<decltype(element)>(params, parallel); });
}

}  // namespace SR_KERNELS_ISA
}  // namespace sr_kernels
