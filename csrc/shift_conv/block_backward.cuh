// The fused block's backward on CUDA, in 16 bits, without a hidden map in memory: two kernels, each
// of which makes z and dz again, in shared memory, tile by tile.
//
//   z = W0 S(x) + b0    u = W1^T G    dz = S^T(u) act'(z)                 hidden_gradient
//   dx = S^T(W0^T dz) (+ G)                                   block_input_gradient_kernel
//   dW0 = dz S(x)^T    db0 = sum dz    dW1 = G S(act(z))^T    db1 = sum G
//                                                             block_weight_gradient_kernel
//
// Tile: 8 x 16 pixels q of the hidden map, 64 of its channels at a time. z is a product over the
// tile, S(x) being an offset in the load. dz of channel j at q needs u of the pixel q - s(j) alone:
// u is a product over the tile and a halo of one pixel, 10 x 18 (192 computed), and each of its
// values is stored where S^T puts it, those that belong to another tile not at all. x and G come in
// pieces of 64 channels, and stay where there is only one; so do weights, as they lie in memory.
//
// dx: a block has one tile and all hidden channels, dx's sums (64 channels, or 192) stay in
// registers until these are through; the shift is in the store, so that every element has one
// writer and nothing of dz is computed twice.
// Weights: a block has 64 hidden channels and every `slices`-th tile. Sums of dW0's rows and of
// dW1's columns stay in registers; dW1 sums G over the tile and its halo, times hidden values at
// the place that the second shift reads them from, zero where these are another tile's. Each block
// writes its sums to its own part of a workspace, reduce_kernel adds the parts in order.
//
// Floor, per pixel, C channels in and out, H hidden, e bytes an element: 3 e C bytes, 10 C H FLOP.
// Here, up to C 64: 5 e C bytes (x and G twice, dx; halos, the residual and the weights' further
// hidden channels read again what was read just before) and 17 C H FLOP: 7 for dx (z, 3/2 of u, its
// own product), 10 for the weights (z, 3/2 of u, dW0, 3/2 of dW1). The sequence of backward.cuh has
// 10 C H FLOP and e (8 C + 6 H) bytes, at H = 2 C four times as many. What it stores is bytes, what
// is made again is products: a good exchange on tensor cores, a bad one for FFMA (15 FLOP a byte
// already at C 60, H 120), so float32 keeps the sequence. So do more than 192 channels, for whose
// sums there are no registers. One kernel for all gradients would take 12 C H FLOP and 3 e C bytes,
// but hold 96 sums of dx and the weights in each thread at C 60 and H 120, beside the 48 of u, and
// has no form for 180 channels.
// No exponentials but silu's: one for each hidden value, here up to four.
// Measured fraction: unmeasured, never run on a GPU.
#pragma once

#include "shift_conv/forward.cuh"

namespace sr_kernels {

struct BlockBackwardParams {
  ImageSize size;
  int c_in, c_hidden, c_out;
  FeatureMap x, grad, dx;
  const void *w0, *b0, *w1;
  Shift shift_in, shift_hidden;
  Activation activation;
  float slope;
  bool residual;
  int slices;
  float *dw0_parts, *db0_parts, *dw1_parts, *db1_parts;  // one for each slice; or nullptr
};

// A tile of pixels, and what a block has of it in shared memory.
template <typename E>
struct HiddenTile {
  static constexpr int kRows = 8, kColumns = 16, kPixels = kRows * kColumns;
  static constexpr int kHaloColumns = kColumns + 2;
  static constexpr int kHaloPixels = 192;  // with the halo, padded to what a product computes
  static constexpr int kPiece = 64;        // channels of x and G
  using Inner = RectanglePixels<kRows, kColumns, 0>;
  using Outer = RectanglePixels<kRows, kColumns, 1>;
  using Input = InputTile<E, kPixels, kPixels>;
  using Grad = InputTile<E, kHaloPixels, kHaloPixels>;

  static constexpr int kBytes = static_cast<int>(sizeof(E));
  static constexpr int kLdW = kPiece + 8, kLdGradient = kPixels + 8, kLdHidden = kHaloPixels + 8;
  static constexpr int kGradAt = kProductRows * kLdW * kBytes;
  static constexpr int kInputAt = kGradAt + Grad::bytes(kPiece);
  static constexpr int kGradientAt = kInputAt + Input::bytes(kPiece);
  static constexpr int kHiddenAt = kGradientAt + kProductRows * kLdGradient * kBytes;
  static constexpr int kEnd = kHiddenAt + kProductRows * kLdHidden * kBytes;
  // Sums of db0's rows, then of db1's, of up to three units: registers are for products.
  static constexpr int kBiasAt = kEnd;
  static constexpr int weight_gradient_bytes(int units) {
    return kBiasAt + (1 + units) * kProductRows * 4;
  }
  // gelu and silu need z again, in the place of act(z).
  static int input_gradient_bytes(Activation activation) {
    return fits_in_epilogue(activation) ? kHiddenAt : kEnd;
  }

  Inner inner;
  Outer outer;

  // Tiles of all images: an int, or the launch is refused.
  static SR_HOST_DEVICE int64_t count(const ImageSize& size) {
    return size.batch * ((size.height + kRows - 1) / kRows) *
           ((size.width + kColumns - 1) / kColumns);
  }
  SR_DEVICE HiddenTile(const ImageSize& size, int index) {
    const int tiles_w = (size.width + kColumns - 1) / kColumns;
    const int tiles_h = (size.height + kRows - 1) / kRows;
    const int w0 = static_cast<int>(index % tiles_w) * kColumns;
    const int h0 = static_cast<int>(index / tiles_w % tiles_h) * kRows;
    const int n = index / tiles_w / tiles_h;
    inner = {size, n, h0, w0};
    outer = {size, n, h0 - 1, w0 - 1};
  }
  // Of the tile's pixel q moved by `offset`, with the halo.
  static SR_DEVICE int outer_index(int q, int dy, int dx) {
    return (q / kColumns + dy + 1) * kHaloColumns + q % kColumns + dx + 1;
  }
};

static_assert(HiddenTile<__half>::weight_gradient_bytes(3) <= kMaxSharedBytes,
              "starts on every GPU");

// The arrays of a HiddenTile.
template <typename E>
struct HiddenArrays {
  using Tile = HiddenTile<E>;
  E* weights;
  typename Tile::Grad grad;    // [channel][pixel] of G with the halo, or [pixel][channel]
  typename Tile::Input input;  // likewise S(x), without
  E* gradient;                 // dz, [channel][pixel]
  E* hidden;  // act(z), [channel][pixel with the halo], at the pixel that reads it; or nullptr

  SR_DEVICE HiddenArrays(const BlockBackwardParams& p, bool with_hidden)
      : weights(shared_array<E>(0, kProductRows * Tile::kLdW)),
        grad(Tile::kGradAt, Tile::kPiece, p.grad),
        input(Tile::kInputAt, Tile::kPiece, p.x),
        gradient(shared_array<E>(Tile::kGradientAt, kProductRows * Tile::kLdGradient)),
        hidden(with_hidden ? shared_array<E>(Tile::kHiddenAt, kProductRows * Tile::kLdHidden)
                           : nullptr) {}

  // Channels from `first` on, of which one piece is there at a time.
  SR_DEVICE void load_grad(const BlockBackwardParams& p, const Tile& tile, int first,
                           int thread) const {
    grad.load(Tile::kPiece, p.grad, p.size, tile.outer, Shift(), first, p.c_out - first, thread);
  }
  SR_DEVICE void load_input(const BlockBackwardParams& p, const Tile& tile, int first,
                            int thread) const {
    input.load(Tile::kPiece, p.x, p.size, tile.inner, p.shift_in, first, p.c_in - first, thread);
  }
  // 64 x 64 of a dense matrix as it lies, zero beyond its end.
  SR_DEVICE void load_piece(const void* matrix, int row, int column, int rows, int columns,
                            int thread) const {
    load_weights<E, Tile::kPiece>(
        weights, Tile::kLdW, Tile::kPiece,
        static_cast<const E*>(matrix) + static_cast<int64_t>(row) * columns + column, columns, 1,
        rows - row, columns - column, thread);
  }
};

// dz of hidden channels j0 ... j0 + 63 in a tile, zero from c_hidden on and outside of the image;
// with s.hidden, act(z) too. `fresh`: the tile is another than that of the call before. Leaves the
// last pieces of G, S(x) and W0's rows where they are. Begins with a barrier; the one behind it is
// the caller's.
template <typename E>
SR_DEVICE void hidden_gradient(const BlockBackwardParams& p, const HiddenArrays<E>& s,
                               const HiddenTile<E>& tile, int j0, bool fresh, int thread) {
  using Tile = HiddenTile<E>;
  constexpr int kPiece = Tile::kPiece;
  const int j_count = p.c_hidden - j0 < kProductRows ? p.c_hidden - j0 : kProductRows;
  const auto padded = [](int channels) {
    return channels < kPiece ? round_up(channels, kStepOfK<E>) : kPiece;
  };

  TileProduct<E, Tile::kHaloPixels> u;
#pragma unroll 1
  for (int m0 = 0; m0 < p.c_out; m0 += kPiece) {
    __syncthreads();
    s.load_piece(p.w1, m0, j0, p.c_out, p.c_hidden, opaque(thread));
    if (fresh || p.c_out > kPiece) s.load_grad(p, tile, m0, opaque(thread));
    finish_copies();
#pragma unroll 1  // a step at a time: two would hold fragments of both beside all these sums
    for (int k = 0; k < padded(p.c_out - m0); k += kStepOfK<E>)
      s.grad.template accumulate<true>(u, s.weights + k * Tile::kLdW, Tile::kLdW, k, kStepOfK<E>,
                                       opaque(thread));
  }
  u.visit(opaque(thread), [&](int row, int column, float first, float second) {
    const ShiftOffset offset = p.shift_hidden(j0 + row);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Pixel at = tile.outer[column + i];
      const int h = at.h - tile.inner.h0 + offset.dy, w = at.w - tile.inner.w0 + offset.dx;
      if (!at.exists || h < 0 || h >= Tile::kRows || w < 0 || w >= Tile::kColumns) continue;
      const bool real = row < j_count && p.size.has(at.h, at.w);
      store_shared<E>(s.gradient + row * Tile::kLdGradient + h * Tile::kColumns + w,
                      from_float<E>(real ? (i == 0 ? first : second) : 0.0f));
    }
  });

  TileProduct<E, Tile::kPixels> z;
#pragma unroll 1
  for (int c0 = 0; c0 < p.c_in; c0 += kPiece) {
    __syncthreads();
    s.load_piece(p.w0, j0, c0, p.c_hidden, p.c_in, opaque(thread));
    if (fresh || p.c_in > kPiece) s.load_input(p, tile, c0, opaque(thread));
    finish_copies();
    s.input.accumulate(z, s.weights, Tile::kLdW, 0, padded(p.c_in - c0), opaque(thread));
  }
  z.visit(opaque(thread), [&](int row, int column, float first, float second) {
    const ShiftOffset offset = p.shift_hidden(j0 + row);
    float bias = 0.0f;
    if (row < j_count && p.b0 != nullptr)
      bias = to_float(load_global<E>(static_cast<const E*>(p.b0) + j0 + row));
    E* const place = s.gradient + row * Tile::kLdGradient + column;
    auto gradient = load_shared<Vector<E, 2>>(place);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool real = row < j_count && tile.inner[column + i].exists;
      const float value = real ? (i == 0 ? first : second) + bias : 0.0f;
      const float derivative = real ? derivative_in_epilogue(p.activation, p.slope, value) : 0.0f;
      gradient.element[i] = from_float<E>(real ? to_float(gradient.element[i]) * derivative : 0.0f);
      if (s.hidden != nullptr)
        store_shared<E>(s.hidden + row * Tile::kLdHidden +
                            Tile::outer_index(column + i, -offset.dy, -offset.dx),
                        from_float<E>(activate_in_epilogue(p.activation, p.slope, value)));
    }
    store_shared(place, gradient);
  });
  if (fits_in_epilogue(p.activation)) return;
  __syncthreads();
#pragma unroll 1
  for (int i = thread; i < kProductRows * Tile::kPixels; i += kBlockThreads) {
    const int row = i / Tile::kPixels, q = i % Tile::kPixels;
    const ShiftOffset offset = p.shift_hidden(j0 + row);
    E* const gradient = s.gradient + row * Tile::kLdGradient + q;
    E* const hidden =
        s.hidden + row * Tile::kLdHidden + Tile::outer_index(q, -offset.dy, -offset.dx);
    const float value = to_float(load_shared<E>(hidden));
    store_shared<E>(hidden, from_float<E>(activate(p.activation, value, p.slope)));
    store_shared<E>(gradient, from_float<E>(to_float(load_shared<E>(gradient)) *
                                            activation_derivative(p.activation, value, p.slope)));
  }
}

// sums[unit] += product, of sums in registers, which no index can reach.
template <int kUnits, typename Product>
SR_DEVICE void add_to(Product (&sums)[kUnits], int unit, const Product& product) {
#pragma unroll
  for (int i = 0; i < kUnits; ++i)
    if (i == unit) sums[i].add(product);
}

// kUnits: c_in (and, of the weights, c_out) in units of 64.
template <typename E, int kUnits>
__global__ void __launch_bounds__(kBlockThreads, kUnits == 1 ? 2 : 1)
    block_input_gradient_kernel(BlockBackwardParams p) {
  using Tile = HiddenTile<E>;
  const int thread = static_cast<int>(threadIdx.x);
  const Tile tile(p.size, static_cast<int>(blockIdx.x));
  const HiddenArrays<E> s(p, !fits_in_epilogue(p.activation));

  TileProduct<E, Tile::kPixels> dx[kUnits];
#pragma unroll 1
  for (int j0 = 0; j0 < p.c_hidden; j0 += kProductRows) {
    hidden_gradient(p, s, tile, j0, j0 == 0, thread);
    const int j_count = p.c_hidden - j0 < kProductRows ? p.c_hidden - j0 : kProductRows;
    __syncthreads();
#pragma unroll
    for (int unit = kUnits - 1; unit >= 0; --unit) {  // the last piece of W0 is there
      const int c0 = unit * kProductRows;
      if (c0 >= p.c_in) continue;
      if (c0 + kProductRows < p.c_in) {
        __syncthreads();
        s.load_piece(p.w0, j0, c0, p.c_hidden, p.c_in, opaque(thread));
        finish_copies();
      }
      dx[unit].template accumulate<true>(s.weights, Tile::kLdW, s.gradient, Tile::kLdGradient,
                                         round_up(j_count, kStepOfK<E>), opaque(thread));
    }
  }

  const SumStage<Tile::kPixels> stage(p.dx);
  const uint64_t places = run_places<E>(p.dx, stage.by_pixel) |
                          (p.residual ? run_places<E>(p.grad, stage.by_pixel) : 0) |
                          scatter_places(p.shift_in, stage.by_pixel);
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    const int c0 = unit * kProductRows;
    if (c0 >= p.c_in) continue;
    const int count = p.c_in - c0 < kProductRows ? p.c_in - c0 : kProductRows;
    __syncthreads();
    stage.template put<E>(dx[unit], nullptr, count, thread);
    __syncthreads();
    stage.template visit<E>(places, tile.inner, p.size.width, count, thread,
                            [&](const Pixel& at, int c, int, auto& value) {
                              constexpr int kRun = sizeof(value) / sizeof(float);
                              const Scattered to(p.size, at, p.shift_in(c0 + c));
                              if (to.lost) {
#pragma unroll
                                for (int i = 0; i < kRun; ++i) value[i] = 0.0f;
                              }
                              if (p.residual) add_run<E>(value, p.grad, to.pixel, c0 + c);
                              put_run<E>(value, p.dx, to.pixel, c0 + c);
                            });
  }
}

template <typename E, int kUnits>
__global__ void __launch_bounds__(kBlockThreads, kUnits == 1 ? 2 : 1)
    block_weight_gradient_kernel(BlockBackwardParams p) {
  using Tile = HiddenTile<E>;
  using Product = TileProduct<E, Tile::kPiece>;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t slice = blockIdx.x;
  const int j0 = static_cast<int>(blockIdx.y) * kProductRows;
  const HiddenArrays<E> s(p, true);
  // The places that a shift leaves out are the same in every tile.
  Vector<E, 8> zeros;
#pragma unroll
  for (int i = 0; i < 8; ++i) zeros.element[i] = from_float<E>(0.0f);
  for (int i = thread; i < kProductRows * Tile::kLdHidden / 8; i += kBlockThreads)
    store_shared(s.hidden + 8 * i, zeros);

  float* const bias_sums = shared_array<float>(Tile::kBiasAt, (1 + kUnits) * kProductRows);
  for (int i = thread; i < (1 + kUnits) * kProductRows; i += kBlockThreads)
    store_shared<float>(bias_sums + i, 0.0f);
  // A row's sum over pixels, of which four threads have a part each.
  const auto add_bias = [&](int unit, float sum) {
    sum += __shfl_xor_sync(kFullWarp, sum, 1);
    sum += __shfl_xor_sync(kFullWarp, sum, 2);
    float* const to = bias_sums + unit * kProductRows + thread / 4;
    if (thread % 4 == 0) store_shared<float>(to, load_shared<float>(to) + sum);
  };

  Product dw0[kUnits], dw1[kUnits];  // rows: hidden channels; sums of sums
  const bool with_db1 = p.db1_parts != nullptr && j0 == 0;
  const int tiles = static_cast<int>(Tile::count(p.size));
#pragma unroll 1
  for (int index = static_cast<int>(blockIdx.x); index < tiles; index += p.slices) {
    const Tile tile(p.size, index);
    hidden_gradient(p, s, tile, j0, true, thread);
    __syncthreads();
    if (p.db0_parts != nullptr) {
      float sum = 0.0f;
      for (int i = thread % 4; i < Tile::kPixels; i += 4)
        sum += to_float(load_shared<E>(s.gradient + thread / 4 * Tile::kLdGradient + i));
      add_bias(0, sum);
    }
#pragma unroll 1
    for (int unit = kUnits - 1; unit >= 0; --unit) {  // the last pieces of S(x) and G are there
      const int c0 = unit * Tile::kPiece;
      const bool next_x = c0 + Tile::kPiece < p.c_in, next_grad = c0 + Tile::kPiece < p.c_out;
      if (kUnits > 1 && (next_x || next_grad)) {
        __syncthreads();
        if (next_x) s.load_input(p, tile, c0, opaque(thread));
        if (next_grad) s.load_grad(p, tile, c0, opaque(thread));
        finish_copies();
      }
      Product of_tile;
      if (c0 < p.c_in && p.dw0_parts != nullptr) {
        s.input.accumulate_transposed(of_tile, s.gradient, Tile::kLdGradient, opaque(thread));
        add_to<kUnits>(dw0, unit, of_tile);
      }
      if (c0 >= p.c_out) continue;
      if (p.dw1_parts != nullptr) {
        of_tile = Product();
        s.grad.accumulate_transposed(of_tile, s.hidden, Tile::kLdHidden, opaque(thread));
        add_to<kUnits>(dw1, unit, of_tile);
      }
      if (with_db1) {
        const E* const row = s.grad.data + thread / 4 * (s.grad.by_pixel ? 1 : s.grad.ld);
        float sum = 0.0f;
        for (int i = thread % 4; i < Tile::kPixels; i += 4)
          sum += to_float(
              load_shared<E>(row + Tile::outer_index(i, 0, 0) * (s.grad.by_pixel ? s.grad.ld : 1)));
        add_bias(1 + unit, sum);
      }
    }
  }

#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    const int c0 = unit * Tile::kPiece;
    if (p.dw0_parts != nullptr)
      dw0[unit].visit(thread, [&](int row, int column, float first, float second) {
        const int64_t j = j0 + row, c = c0 + column;
        float* part = p.dw0_parts + (slice * p.c_hidden + j) * p.c_in + c;
        if (j < p.c_hidden && c < p.c_in) store_global<float>(part, first);
        if (j < p.c_hidden && c + 1 < p.c_in) store_global<float>(part + 1, second);
      });
    if (p.dw1_parts != nullptr)
      dw1[unit].visit(thread, [&](int row, int column, float first, float second) {
        const int64_t j = j0 + row, m = c0 + column;
        float* part = p.dw1_parts + (slice * p.c_out + m) * p.c_hidden + j;
        if (j < p.c_hidden && m < p.c_out) store_global<float>(part, first);
        if (j < p.c_hidden && m + 1 < p.c_out) store_global<float>(part + p.c_hidden, second);
      });
  }
  __syncthreads();
  for (int i = thread; i < kProductRows && p.db0_parts != nullptr; i += kBlockThreads)
    if (j0 + i < p.c_hidden)
      store_global<float>(p.db0_parts + slice * p.c_hidden + j0 + i,
                          load_shared<float>(bias_sums + i));
  for (int m = thread; m < p.c_out && with_db1; m += kBlockThreads)
    store_global<float>(p.db1_parts + slice * p.c_out + m,
                        load_shared<float>(bias_sums + kProductRows + m));
}

}  // namespace sr_kernels
