// Shift convolution on the CPU.
//
//   shift_conv2d       y = act(W shift(x) + b) (+ residual)
//   shift_conv_block   y = W1 shift(act(W0 shift(x) + b0)) + b1 (+ x)
//
// Tile: a rectangle of pixels, all channels. The shift is an offset in the load (first product) or
// in a row pointer into the hidden tile (second product); no shifted copy of a feature map exists.
// The block keeps three rows of hidden activations at a time, 3 x c_hidden x tile width, in L2.
//
// Floor, float32, per pixel: shift_conv2d moves 4 (c_in + c_out) bytes and does 2 c_in c_out FLOP;
// the block at C = 60, ratio 2 moves 480 bytes and does 28.8 kFLOP: bound by arithmetic, so the
// ceiling is a large fp32 matrix product on the same cores. Measured fraction: unmeasured.
//
// Backward. With z the pre-activation, dz = grad * act'(z) and S the shift:
//   dW = dz S(x)^T,  db = sum dz,  dx = S^T(W^T dz).
// z is recomputed from x, never stored. S^T moves each channel by -offset: a bijection of pixels
// but for the border, so every element of dx is written by exactly one tile.
#include "shift_conv/params.h"

#include "common/tiling.h"

namespace sr_kernels {
namespace SR_KERNELS_ISA {
namespace {

// ------------------------------------------------------------------ activation of whole vectors
// The formulas of common/activation.h on vectors: exp and erf of the standard library are scalar.

// values[i] <- function(values[i], other[i]) for whole vectors; count is a multiple of the width.
template <typename T, typename Function>
SR_INLINE void transform(T* values, const T* other, int64_t count, const Function& function) {
  for (int64_t i = 0; i < count; i += Simd<T>::width)
    store<T>(values + i, function(load(values + i), load(other + i)));
}

template <typename T>
SR_INLINE Vec<T> gaussian_cdf(Vec<T> v) {
  return T(0.5) * (T(1) + erf(v * T(0.70710678118654752440)));
}

// z <- act(z), in place.
template <typename T>
void activate_row(Activation activation, T slope, T* z, int64_t count) {
  using V = Vec<T>;
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kRelu:
      return transform(z, z, count, [](V v, V) { return v < 0 ? V{} : v; });
    case Activation::kLeakyRelu:
      return transform(z, z, count, [slope](V v, V) { return v > 0 ? v : v * slope; });
    case Activation::kGelu:
      return transform(z, z, count, [](V v, V) { return v * gaussian_cdf<T>(v); });
    case Activation::kSilu:
      return transform(z, z, count, [](V v, V) { return v * sigmoid(v); });
  }
}

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

// ------------------------------------------------------------------ shift_conv2d

template <typename S>
void forward(const ShiftConvParams& p, ParallelFor parallel) {
  using T = typename Compute<S>::type;
  const Tiling tiling(p.batch, p.height, p.width, 4, kMaxColumns);
  const int64_t stride = padded<T>(tiling.columns), pixels = tiling.rows * stride;
  const ShiftedRuns runs(p.pattern, p.c_in, p.groups);

  Scratch shared(Scratch::bytes_for<T>(packed_size(p.c_out, p.c_in)) +
                 Scratch::bytes_for<T>(p.c_out));
  const LeftOperand<T> weight = pack(static_cast<const S*>(p.weight), p.c_in, 1, p.c_out, p.c_in,
                                     shared.take<T>(packed_size(p.c_out, p.c_in)));
  const T* bias = load_vector<S>(p.bias, p.c_out, shared.take<T>(p.c_out));

  parallel_for(parallel, tiling.count(), [&](int64_t begin, int64_t end) {
    const bool residual = p.residual.data != nullptr;
    Scratch scratch(Scratch::bytes_for<T>(p.c_in * pixels) +
                    (residual ? 2 : 1) * Scratch::bytes_for<T>(p.c_out * pixels));
    T* x = scratch.take<T>(p.c_in * pixels);
    T* y = scratch.take<T>(p.c_out * pixels);
    T* r = residual ? scratch.take<T>(p.c_out * pixels) : nullptr;
    for (int64_t index = begin; index < end; ++index) {
      const Tile t = tiling[index];
      const int64_t used = t.rows * stride;
      load_shifted<S>(runs, p.x, t.n, t.h, t.rows, t.w, t.columns, p.height, p.width, x, pixels,
                      stride);
      product(bias != nullptr ? Start::kBias : Start::kZero, p.c_out, p.c_in, used, weight,
              StridedRows<T>{x, pixels}, bias, y, pixels);
      for (int64_t c = 0; c < p.c_out; ++c)
        activate_row(p.activation, T(p.negative_slope), y + c * pixels, used);
      if (residual) {
        load_tile<S>(p.residual, t.n, 0, p.c_out, t.h, t.rows, t.w, t.columns, p.height, p.width, r,
                     pixels, stride);
        for (int64_t c = 0; c < p.c_out; ++c)
          for (int64_t i = 0; i < used; ++i) y[c * pixels + i] += r[c * pixels + i];
      }
      store_tile<S>(y, pixels, stride, p.y, t.n, 0, p.c_out, t.h, t.rows, t.w, t.columns, p.height,
                    p.width);
    }
  });
}

template <typename S>
void backward(const ShiftConvBackwardParams& params, ParallelFor parallel) {
  using T = typename Compute<S>::type;
  const ShiftConvParams& p = params.forward;
  const Tiling tiling(p.batch, p.height, p.width, 4, kMaxColumns);
  const int64_t stride = padded<T>(tiling.columns), pixels = tiling.rows * stride;
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
  const LeftOperand<T> weight_transposed =
      pack(w, 1, p.c_in, p.c_in, p.c_out, shared.take<T>(packed_size(p.c_in, p.c_out)));
  const T* bias = load_vector<S>(p.bias, p.c_out, shared.take<T>(p.c_out));
  T* partial = shared.take<T>(chunks.count * chunk_size);

  if (want_dx)
    parallel_for(parallel, p.batch, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        fill_uncovered<S>(runs, params.dx, FeatureMap{}, n, p.height, p.width);
    });
  parallel_for(parallel, chunks.count, [&](int64_t begin, int64_t end) {
    Scratch scratch(2 * Scratch::bytes_for<T>(p.c_in * pixels) +
                    2 * Scratch::bytes_for<T>(p.c_out * pixels));
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
        load_tile<S>(params.grad, t.n, 0, p.c_out, t.h, t.rows, t.w, t.columns, p.height, p.width,
                     dz, pixels, stride);
        if (recompute || want_dw)
          load_shifted<S>(runs, p.x, t.n, t.h, t.rows, t.w, t.columns, p.height, p.width, x, pixels,
                          stride);
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
          product<T>(Start::kZero, p.c_in, p.c_out, used, weight_transposed,
                     StridedRows<T>{dz, pixels}, nullptr, dx, pixels);
          store_shifted<S>(runs, dx, pixels, stride, params.dx, t, p.height, p.width);
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

// Sets what lies outside the image to zero: the second convolution's zero fill. A row holds
// columns [w0, w0 + columns).
template <typename T>
void zero_outside(T* row, int64_t w0, int64_t columns, int64_t width) {
  for (int64_t i = 0; i < columns; ++i)
    if (w0 + i < 0 || w0 + i >= width) row[i] = T(0);
}

template <typename S>
void block_forward(const ShiftConvBlockParams& p, ParallelFor parallel) {
  using T = typename Compute<S>::type;
  const Tiling tiling(p.batch, p.height, p.width, 32, kMaxColumns - 2);
  const int64_t stride = padded<T>(tiling.columns + 2);  // one column of halo on either side
  const int64_t slot = stride;                           // a hidden row of one channel
  const int64_t hidden_channel = 3 * slot;               // rows h-1, h, h+1, in a ring
  const ShiftedRuns runs_in(p.pattern, p.c_in, p.groups);
  const ShiftedRuns runs_hidden(p.pattern, p.c_hidden, p.groups);

  Scratch shared(Scratch::bytes_for<T>(packed_size(p.c_hidden, p.c_in)) +
                 Scratch::bytes_for<T>(packed_size(p.c_out, p.c_hidden)) +
                 Scratch::bytes_for<T>(p.c_hidden) + Scratch::bytes_for<T>(p.c_out));
  const LeftOperand<T> w0 = pack(static_cast<const S*>(p.w0), p.c_in, 1, p.c_hidden, p.c_in,
                                 shared.take<T>(packed_size(p.c_hidden, p.c_in)));
  const LeftOperand<T> w1 = pack(static_cast<const S*>(p.w1), p.c_hidden, 1, p.c_out, p.c_hidden,
                                 shared.take<T>(packed_size(p.c_out, p.c_hidden)));
  const T* b0 = load_vector<S>(p.b0, p.c_hidden, shared.take<T>(p.c_hidden));
  const T* b1 = load_vector<S>(p.b1, p.c_out, shared.take<T>(p.c_out));

  parallel_for(parallel, tiling.count(), [&](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::bytes_for<T>(p.c_in * stride) +
                    Scratch::bytes_for<T>(p.c_hidden * hidden_channel) +
                    2 * Scratch::bytes_for<T>(p.c_out * stride) +
                    Scratch::bytes_for<const T*>(p.c_hidden));
    T* x = scratch.take<T>(p.c_in * stride);
    T* hidden = scratch.take<T>(p.c_hidden * hidden_channel);
    T* y = scratch.take<T>(p.c_out * stride);
    T* skip = scratch.take<T>(p.c_out * stride);
    const T** rows = scratch.take<const T*>(p.c_hidden);
    for (int64_t index = begin; index < end; ++index) {
      const Tile t = tiling[index];
      for (int64_t r = -1; r <= t.rows; ++r) {
        const int64_t h = t.h + r;
        T* ring_row = hidden + (r + 1) % 3 * slot;
        if (h < 0 || h >= p.height) {
          for (int64_t c = 0; c < p.c_hidden; ++c)
            std::memset(ring_row + c * hidden_channel, 0, static_cast<size_t>(stride) * sizeof(T));
        } else {
          load_shifted<S>(runs_in, p.x, t.n, h, 1, t.w - 1, t.columns + 2, p.height, p.width, x,
                          stride, stride);
          product(b0 != nullptr ? Start::kBias : Start::kZero, p.c_hidden, p.c_in, stride, w0,
                  StridedRows<T>{x, stride}, b0, ring_row, hidden_channel);
          for (int64_t c = 0; c < p.c_hidden; ++c) {
            T* row = ring_row + c * hidden_channel;
            activate_row(p.activation, T(p.negative_slope), row, stride);
            zero_outside(row, t.w - 1, t.columns + 2, p.width);
          }
        }
        if (r < 1) continue;  // the output row r - 1 needs hidden rows r - 2, r - 1, r
        const int64_t out = r - 1;
        for (const ShiftedRun& run : runs_hidden)
          for (int64_t c = run.begin; c < run.end; ++c)
            rows[c] = hidden + c * hidden_channel + (out + run.offset.dy + 1) % 3 * slot + 1 +
                      run.offset.dx;
        const int64_t used = padded<T>(t.columns);
        product(b1 != nullptr ? Start::kBias : Start::kZero, p.c_out, p.c_hidden, used, w1,
                PointerRows<T>{rows}, b1, y, stride);
        if (p.residual) {
          load_tile<S>(p.x, t.n, 0, p.c_out, t.h + out, 1, t.w, t.columns, p.height, p.width, skip,
                       stride, stride);
          for (int64_t c = 0; c < p.c_out; ++c)
            for (int64_t i = 0; i < used; ++i) y[c * stride + i] += skip[c * stride + i];
        }
        store_tile<S>(y, stride, stride, p.y, t.n, 0, p.c_out, t.h + out, 1, t.w, t.columns,
                      p.height, p.width);
      }
    }
  });
}

// With h = act(z), z = W0 S(x) + b0 and y = W1 S(h) + b1 (+ x):
//   dh = S^T(W1^T grad)     dz = dh * act'(z)     dx = S^T(W0^T dz) (+ grad)
//   dW1[o, c] = sum_p grad[o, p - offset(c)] h[c, p]     dW0 = dz S(x)^T
// Every sum runs over the pixels p of a tile of the hidden map, so only grad needs a halo.
template <typename S>
void block_backward(const ShiftConvBlockBackwardParams& params, ParallelFor parallel) {
  using T = typename Compute<S>::type;
  const ShiftConvBlockParams& p = params.forward;
  const Tiling tiling(p.batch, p.height, p.width, 4, kMaxColumns - 2);
  // All tiles share one row stride, that of the haloed gradient, so that a shift is one offset in
  // a flat run of rows. Pixels beyond a row's end are kept zero.
  const int64_t stride = padded<T>(tiling.columns + 2);
  const int64_t pixels = tiling.rows * stride, halo_pixels = (tiling.rows + 2) * stride;
  const ShiftedRuns runs_in(p.pattern, p.c_in, p.groups);
  const ShiftedRuns runs_hidden(p.pattern, p.c_hidden, p.groups);
  const bool want_dx = params.dx.data != nullptr;
  const bool want_dw0 = params.dw0 != nullptr, want_db0 = params.db0 != nullptr;
  const bool want_dw1 = params.dw1 != nullptr, want_db1 = params.db1 != nullptr;
  const bool want_dz = want_dx || want_dw0 || want_db0;
  const Chunks chunks(tiling.count());
  const int64_t dw0_size = p.c_hidden * p.c_in, dw1_size = p.c_out * p.c_hidden;
  const int64_t chunk_size = dw0_size + dw1_size + p.c_hidden + p.c_out;

  int64_t w1_panels = 0;  // W1^T is packed run by run: its rows' shifts differ
  for (const ShiftedRun& run : runs_hidden) w1_panels += packed_size(run.end - run.begin, p.c_out);
  Scratch shared(Scratch::bytes_for<T>(packed_size(p.c_hidden, p.c_in)) +
                 Scratch::bytes_for<T>(packed_size(p.c_in, p.c_hidden)) +
                 Scratch::bytes_for<T>(w1_panels) + Scratch::bytes_for<T>(p.c_hidden) +
                 Scratch::bytes_for<T>(chunks.count * chunk_size));
  const S* w0_source = static_cast<const S*>(p.w0);
  const LeftOperand<T> w0 = pack(w0_source, p.c_in, 1, p.c_hidden, p.c_in,
                                 shared.take<T>(packed_size(p.c_hidden, p.c_in)));
  const LeftOperand<T> w0_transposed = pack(w0_source, 1, p.c_in, p.c_in, p.c_hidden,
                                            shared.take<T>(packed_size(p.c_in, p.c_hidden)));
  LeftOperand<T> w1_transposed[5];
  {
    T* panels = shared.take<T>(w1_panels);
    for (int i = 0; i < runs_hidden.count; ++i) {
      const ShiftedRun& run = runs_hidden.run[i];
      w1_transposed[i] = pack(static_cast<const S*>(p.w1) + run.begin, 1, p.c_hidden,
                              run.end - run.begin, p.c_out, panels);
      panels += packed_size(run.end - run.begin, p.c_out);
    }
  }
  const T* b0 = load_vector<S>(p.b0, p.c_hidden, shared.take<T>(p.c_hidden));
  T* partial = shared.take<T>(chunks.count * chunk_size);

  if (want_dx)
    parallel_for(parallel, p.batch, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        fill_uncovered<S>(runs_in, params.dx, p.residual ? params.grad : FeatureMap{}, n, p.height,
                          p.width);
    });
  parallel_for(parallel, chunks.count, [&](int64_t begin, int64_t end) {
    Scratch scratch(2 * Scratch::bytes_for<T>(p.c_in * pixels) +
                    3 * Scratch::bytes_for<T>(p.c_hidden * pixels) +
                    Scratch::bytes_for<T>(p.c_out * halo_pixels));
    T* x = scratch.take<T>(p.c_in * pixels);
    T* dx = scratch.take<T>(p.c_in * pixels);
    T* z = scratch.take<T>(p.c_hidden * pixels);
    T* hidden = scratch.take<T>(p.c_hidden * pixels);
    T* dz = scratch.take<T>(p.c_hidden * pixels);
    T* grad = scratch.take<T>(p.c_out * halo_pixels);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      T* dw0_sum = partial + chunk * chunk_size;
      T* dw1_sum = dw0_sum + dw0_size;  // transposed: (c_hidden, c_out)
      T* db0_sum = dw1_sum + dw1_size;
      T* db1_sum = db0_sum + p.c_hidden;
      for (int64_t index = chunks.begin(chunk); index < chunks.end(chunk); ++index) {
        const Tile t = tiling[index];
        const int64_t used = t.rows * stride;
        load_tile<S>(params.grad, t.n, 0, p.c_out, t.h - 1, t.rows + 2, t.w - 1, t.columns + 2,
                     p.height, p.width, grad, halo_pixels, stride);
        load_shifted<S>(runs_in, p.x, t.n, t.h, t.rows, t.w, t.columns, p.height, p.width, x,
                        pixels, stride);
        product(b0 != nullptr ? Start::kBias : Start::kZero, p.c_hidden, p.c_in, used, w0,
                StridedRows<T>{x, pixels}, b0, z, pixels);
        // grad[o, p - offset] for hidden pixel p, as a flat offset into the haloed tile
        const auto grad_at = [&](const ShiftedRun& run) {
          return grad + (1 - run.offset.dy) * stride + (1 - run.offset.dx);
        };
        if (want_dw1) {
          for (int64_t c = 0; c < p.c_hidden; ++c) {
            T* row = hidden + c * pixels;
            std::memcpy(row, z + c * pixels, static_cast<size_t>(used) * sizeof(T));
            activate_row(p.activation, T(p.negative_slope), row, used);
            for (int64_t r = 0; r < t.rows; ++r)  // padding must not add to the sums
              for (int64_t i = t.columns; i < stride; ++i) row[r * stride + i] = T(0);
          }
          for (const ShiftedRun& run : runs_hidden)
            accumulate_inner_products(run.end - run.begin, p.c_out, used,
                                      StridedRows<T>{hidden + run.begin * pixels, pixels},
                                      StridedRows<T>{grad_at(run), halo_pixels},
                                      dw1_sum + run.begin * p.c_out, p.c_out);
        }
        if (want_db1) {
          for (int64_t o = 0; o < p.c_out; ++o)
            for (int64_t r = 0; r < t.rows; ++r)
              for (int64_t i = 0; i < t.columns; ++i)
                db1_sum[o] += grad[o * halo_pixels + (r + 1) * stride + i + 1];
        }
        if (!want_dz) continue;
        for (int i = 0; i < runs_hidden.count; ++i) {
          const ShiftedRun& run = runs_hidden.run[i];
          product<T>(Start::kZero, run.end - run.begin, p.c_out, used, w1_transposed[i],
                     StridedRows<T>{grad_at(run), halo_pixels}, nullptr, dz + run.begin * pixels,
                     pixels);
        }
        for (int64_t c = 0; c < p.c_hidden; ++c) {
          T* row = dz + c * pixels;
          multiply_by_derivative(p.activation, T(p.negative_slope), z + c * pixels, row, used);
          for (int64_t r = 0; r < t.rows; ++r)
            for (int64_t i = t.columns; i < stride; ++i) row[r * stride + i] = T(0);
        }
        if (want_dw0)
          accumulate_inner_products(p.c_hidden, p.c_in, used, StridedRows<T>{dz, pixels},
                                    StridedRows<T>{x, pixels}, dw0_sum, p.c_in);
        if (want_db0) accumulate_row_sums(p.c_hidden, used, StridedRows<T>{dz, pixels}, db0_sum);
        if (want_dx) {
          product<T>(Start::kZero, p.c_in, p.c_hidden, used, w0_transposed,
                     StridedRows<T>{dz, pixels}, nullptr, dx, pixels);
          if (p.residual) {
            // The residual's gradient at the target pixel: p + offset, in the haloed tile.
            for (const ShiftedRun& run : runs_in)
              for (int64_t c = run.begin; c < run.end; ++c) {
                const T* direct =
                    grad + c * halo_pixels + (1 + run.offset.dy) * stride + 1 + run.offset.dx;
                for (int64_t i = 0; i < used; ++i) dx[c * pixels + i] += direct[i];
              }
          }
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
    for (int64_t c = 0; c < p.c_hidden; ++c)
      for (int64_t o = 0; o < p.c_out; ++o)
        reduce_chunks(partial + dw0_size + c * p.c_out + o, chunks.count, chunk_size, 1,
                      dw1 + o * p.c_hidden + c);
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
  dispatch_scalar(params.kind, [&](auto element) { forward<decltype(element)>(params, parallel); });
}
void shift_conv2d_backward(const ShiftConvBackwardParams& params, ParallelFor parallel) {
  dispatch_scalar(params.forward.kind,
                  [&](auto element) { backward<decltype(element)>(params, parallel); });
}
void shift_conv_block(const ShiftConvBlockParams& params, ParallelFor parallel) {
  dispatch_scalar(params.kind,
                  [&](auto element) { block_forward<decltype(element)>(params, parallel); });
}
void shift_conv_block_backward(const ShiftConvBlockBackwardParams& params, ParallelFor parallel) {
  dispatch_scalar(params.forward.kind,
                  [&](auto element) { block_backward<decltype(element)>(params, parallel); });
}

}  // namespace SR_KERNELS_ISA
}  // namespace sr_kernels
