// DCTLSA's attention with its local branch on the CPU, inference only.
//
//   u = x + W1 depthwise3x3(W0 x + b0) + b1              in the rolled image, zero outside it
//   q, k, v = W_qkv u + b_qkv,   y = u + W_out (scale q (softmax_tokens(k)^T v)) + b_out
//                                                        in each window, per head
//
// One window at a time, from x to y: its pixels with a halo of one, channels side by side as a
// channels_last image has them, and padded to whole vectors with zeros. Roll and partition are
// index arithmetic of the load and the store; all between stays in L2.
//
// K is the softmax, U a window's tokens. The weights of a softmax add up to one, so that
// K^T v = K^T U W_v^T + b_v, and a number that b_k adds to all tokens changes nothing. What is left
// per window is one C x C matrix,
//
//   M = scale W_q^T [blocks of heads of (K^T U W_v^T + b_v)] W_out^T,   y = u + u M + b_q part +
//   b_out
//
// through which u goes once: q and v are never formed. Vectors run along channels everywhere, the
// softmax runs down the tokens, and nothing is reduced across a vector.
//
// Tile: a window. With C = 55 and windows of 16 x 16 (DCTLSA) two maps with halo and u, together
// 0.2 MB.
// Floor, float32, per pixel: 8 C bytes; 2 C (5 C + 9) FLOP, 2 C^2 ((h + 2) (w + 2) / (h w) - 1) for
// the halo of h x w windows, and 2 C^2 (C + 2 C / heads) / (h w) for M; C exponentials. C = 55 and
// 16 x 16: 440 bytes, 35 kFLOP. Bound by arithmetic. Measured at 96 x 96, channels_last, shifted,
// on one thread of a Zen 3 core (AVX2): 5.4 ms, a fraction of 0.74 where a 1024 x 1024 product in
// the same run reached 80 GFLOP/s. The exponentials and the depthwise convolution are the rest.
#include "linear_attention/params.h"

#include "common/pixel_product.h"
#include "common/row_product.h"
#include "common/simd.h"
#include "common/tiling.h"

namespace sr_kernels {
namespace SR_KERNELS_ISA {
namespace {

// Tokens whose exponentials are multiplied with u while both are in L1.
constexpr int64_t kTokens = 64;

// ------------------------------------------------------------------ weights

// Weights as compute elements. A row of channels is ld long; zeros fill it up.
template <typename S>
struct Weights {
  using T = typename Compute<S>::type;
  int64_t c, ld;
  Scratch scratch;
  const T *w0, *w1, *w_k;    // packed for pixel_product()
  const T *b0, *b1, *b_out;  // rows
  const T* taps;             // of the depthwise convolution: 9 rows
  const T *w_q, *b_q;        // (C, C) and (C)
  const T *w_v, *w_out;      // transposed: a row for each input. w_out comes with the scale
  const T* v_bias;           // W_out b_v of each head, with the scale: a row each

  explicit Weights(const LinearAttentionParams& p)
      : c(p.channels),
        ld(padded<T>(c)),
        scratch(6 * Scratch::bytes_for<T>(c * ld) + Scratch::bytes_for<T>(c * c) +
                4 * Scratch::bytes_for<T>(ld) + Scratch::bytes_for<T>(9 * ld) +
                Scratch::bytes_for<T>(p.num_heads * ld)) {
    const S *qkv = static_cast<const S*>(p.w_qkv), *b_qkv = static_cast<const S*>(p.b_qkv);
    T* matrix = scratch.template take<T>(c * ld);
    const auto packed = [&](const S* source) {
      return pack_panels(transposed(source, c, matrix), ld, 1, c, ld,
                         scratch.template take<T>(c * ld));
    };
    w0 = packed(static_cast<const S*>(p.w0));
    w1 = packed(static_cast<const S*>(p.w1));
    w_k = packed(qkv + c * c);
    w_v = transposed(qkv + 2 * c * c, c, scratch.template take<T>(c * ld));
    T* out = transposed(static_cast<const S*>(p.w_out), c, scratch.template take<T>(c * ld));
    for (int64_t i = 0; i < c * ld; ++i) out[i] *= T(p.scale);
    w_out = out;
    w_q = load_vector<S>(qkv, c * c, scratch.template take<T>(c * c));
    b0 = row(static_cast<const S*>(p.b0));
    b1 = row(static_cast<const S*>(p.b1));
    b_out = row(static_cast<const S*>(p.b_out));
    b_q = row(b_qkv);
    taps = transposed(static_cast<const S*>(p.w_depth), 9, scratch.template take<T>(9 * ld));
    T* rows = scratch.template take<T>(p.num_heads * ld);
    v_bias = rows;
    if (b_qkv == nullptr) return;
    const int64_t d = c / p.num_heads;
    for (int64_t o = 0; o < c; ++o) {
      const T value = to_compute(b_qkv[2 * c + o]);
      for (int64_t n = 0; n < c; ++n) rows[o / d * ld + n] += value * out[o * ld + n];
    }
  }

 private:
  // (C, columns) as columns rows of ld.
  T* transposed(const S* source, int64_t columns, T* destination) const {
    transpose_block(source, columns, c, columns, destination, ld, true);
    return destination;
  }
  const T* row(const S* source) {
    T* destination = scratch.template take<T>(ld);
    if (source != nullptr) load_elements(source, 1, c, destination);
    return destination;
  }
};

// ------------------------------------------------------------------ pixels

// destination[i * ld + c] = map[n, c, h, w + i] for i < count, and the way back.
template <typename S, typename T>
void load_pixels(const FeatureMap& map, int64_t n, int64_t channels, int64_t h, int64_t w,
                 int64_t count, T* destination, int64_t ld) {
  const S* source = at<S>(map, n, 0, h, w);
  if (map.stride_c != 1 && map.stride_w == 1)
    return transpose_block(source, map.stride_c, channels, count, destination, ld, true);
  for (int64_t i = 0; i < count; ++i)
    load_elements(source + i * map.stride_w, map.stride_c, channels, destination + i * ld);
}
template <typename S, typename T>
void store_pixels(const T* source, int64_t ld, const FeatureMap& map, int64_t n, int64_t channels,
                  int64_t h, int64_t w, int64_t count) {
  S* destination = at<S>(map, n, 0, h, w);
  if (map.stride_c != 1 && map.stride_w == 1)
    return transpose_block(source, ld, count, channels, destination, map.stride_c, false);
  for (int64_t i = 0; i < count; ++i)
    store_elements(source + i * ld, channels, destination + i * map.stride_w, map.stride_c);
}

// Calls visit(h, w, count, i) for every run of pixels [i, i + count) of `total` in a row of the
// rolled image, from (h, w) of the image on.
template <typename Visit>
SR_INLINE void for_each_run_of_row(const WindowGeometry& geometry, int64_t rolled_h,
                                   int64_t rolled_w, int64_t total, const Visit& visit) {
  const int64_t h = (rolled_h + geometry.shift_h) % geometry.height;
  int64_t w = (rolled_w + geometry.shift_w) % geometry.width;
  for (int64_t i = 0; i < total; w = 0) {
    const int64_t count = min64(total - i, geometry.width - w);
    visit(h, w, count, i);
    i += count;
  }
}

// ------------------------------------------------------------------ a window

template <typename S>
class Worker {
  using T = typename Compute<S>::type;
  static constexpr int W = Simd<T>::width;

 public:
  Worker(const LinearAttentionParams& params, const Weights<S>& w)
      : p(params),
        weights(w),
        g(params.geometry),
        c(w.c),
        ld(w.ld),
        d(w.c / params.num_heads),
        height(g.window_h),
        width(g.window_w),
        row(ld * (g.window_w + 2)),
        scratch(2 * Scratch::bytes_for<T>((height + 2) * row) +
                Scratch::bytes_for<T>(height * width * ld) + Scratch::bytes_for<T>(width * ld) +
                4 * Scratch::bytes_for<T>(c * ld) + Scratch::bytes_for<T>(d * padded<T>(d)) +
                3 * Scratch::bytes_for<T>(ld)) {
    x = scratch.template take<T>((height + 2) * row);
    t = scratch.template take<T>((height + 2) * row);
    u = scratch.template take<T>(height * width * ld);
    line = scratch.template take<T>(width * ld);
    state = scratch.template take<T>(c * ld);
    heads = scratch.template take<T>(c * ld);
    matrix = scratch.template take<T>(c * ld);
    panels = scratch.template take<T>(c * ld);
    value = scratch.template take<T>(d * padded<T>(d));
    highest = scratch.template take<T>(ld);
    sum = scratch.template take<T>(ld);
    offset = scratch.template take<T>(ld);
  }

  void run(int64_t index) {
    const int64_t b = index % g.windows_w(), a = index / g.windows_w() % g.windows_h();
    const int64_t n = index / (g.windows_w() * g.windows_h());
    local_branch(n, a, b);
    sum_up_keys();
    make_matrix();
    for (int64_t r = 0; r < height; ++r) {
      const T* source = u + r * width * ld;
      pixel_product<T>(
          width, c, ld, source, ld, panels, [&](int64_t column) { return load(offset + column); },
          [&](int64_t m, int64_t column, Vec<T> v) {
            store<T>(line + m * ld + column, v + load(source + m * ld + column));
          });
      for_each_run_of_row(g, a * height + r, b * width, width,
                          [&](int64_t h, int64_t w, int64_t count, int64_t i) {
                            store_pixels<S>(line + i * ld, ld, p.y, n, c, h, w, count);
                          });
    }
  }

 private:
  // u = x + W1 depthwise(W0 x + b0) + b1. Rows and columns count from the halo's.
  void local_branch(int64_t n, int64_t a, int64_t b) {
    const int64_t top = a == 0 ? 1 : 0, bottom = height + (a == g.windows_h() - 1 ? 1 : 2);
    const int64_t left = b == 0 ? 1 : 0, right = width + (b == g.windows_w() - 1 ? 1 : 2);
    for (int64_t r = top; r < bottom; ++r)
      for_each_run_of_row(g, a * height + r - 1, b * width + left - 1, right - left,
                          [&](int64_t h, int64_t w, int64_t count, int64_t i) {
                            load_pixels<S>(p.x, n, c, h, w, count, x + r * row + (left + i) * ld,
                                           ld);
                          });
    T* first = t + top * row;
    pixel_product<T>(
        (bottom - top) * (width + 2), c, ld, x + top * row, ld, weights.w0,
        [&](int64_t column) { return load(weights.b0 + column); },
        [&](int64_t m, int64_t column, Vec<T> v) { store<T>(first + m * ld + column, v); });
    const auto clear = [](T* values, int64_t count) {
      for (int64_t i = 0; i < count; ++i) values[i] = T(0);
    };
    if (top > 0) clear(t, row);
    if (bottom < height + 2) clear(t + bottom * row, row);
    for (int64_t r = top; r < bottom; ++r) {
      if (left > 0) clear(t + r * row, ld);
      if (right < width + 2) clear(t + r * row + right * ld, ld);
    }
    for (int64_t r = 0; r < height; ++r) {
      depthwise(t + r * row);
      const T* residual = x + (r + 1) * row + ld;
      T* target = u + r * width * ld;
      pixel_product<T>(
          width, c, ld, line, ld, weights.w1,
          [&](int64_t column) { return load(weights.b1 + column); },
          [&](int64_t m, int64_t column, Vec<T> v) {
            store<T>(target + m * ld + column, v + load(residual + m * ld + column));
          });
    }
  }

  // One row of the 3x3 depthwise convolution, from the three that begin at `source`.
  void depthwise(const T* source) {
    for (int64_t k = 0; k < ld; k += W) {
      Vec<T> taps[9];
#pragma GCC unroll 9
      for (int j = 0; j < 9; ++j) taps[j] = load(weights.taps + j * ld + k);
      for (int64_t i = 0; i < width; ++i) {
        const T* pixel = source + i * ld + k;
        Vec<T> sums[3];
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j)
          sums[j] = taps[3 * j] * load(pixel + j * row) +
                    taps[3 * j + 1] * load(pixel + j * row + ld) +
                    taps[3 * j + 2] * load(pixel + j * row + 2 * ld);
        store<T>(line + i * ld + k, sums[0] + sums[1] + sums[2]);
      }
    }
  }

  // state = softmax_tokens(k)^T u, channels of k by channels of u. k takes t's memory.
  void sum_up_keys() {
    const int64_t tokens = height * width;
    T* k = t;
    pixel_product<T>(
        tokens, c, ld, u, ld, weights.w_k, [](int64_t) { return Vec<T>{}; },
        [&](int64_t m, int64_t column, Vec<T> v) { store<T>(k + m * ld + column, v); });
    for (int64_t i = 0; i < ld; ++i) highest[i] = k[i], sum[i] = T(0);
    for (int64_t j = 1; j < tokens; ++j)
      for (int64_t i = 0; i < ld; i += W) {
        const Vec<T> most = load(highest + i), other = load(k + j * ld + i);
        store<T>(highest + i, other > most ? other : most);
      }
    for (int64_t j0 = 0; j0 < tokens; j0 += kTokens) {
      const int64_t count = min64(kTokens, tokens - j0);
      for (int64_t j = j0; j < j0 + count; ++j)
        for (int64_t i = 0; i < ld; i += W) {
          const Vec<T> e = exp(load(k + j * ld + i) - load(highest + i));
          store<T>(k + j * ld + i, e);
          store<T>(sum + i, load(sum + i) + e);
        }
      row_product<T>(nullptr, j0 > 0, c, count, ld, k + j0 * ld, 1, ld, u + j0 * ld, ld, state, ld);
    }
    for (int64_t m = 0; m < c; ++m) {
      const T factor = T(1) / sum[m];
      for (int64_t i = 0; i < ld; i += W)
        store<T>(state + m * ld + i, load(state + m * ld + i) * broadcast(factor));
    }
  }

  // panels and offset: what takes u to y - u.
  void make_matrix() {
    const int64_t wide = padded<T>(d);
    for (int64_t head = 0; head < p.num_heads; ++head) {
      // Reads past the head's columns of w_v, and makes columns that nobody reads.
      row_product<T>(nullptr, false, d, c, wide, state + head * d * ld, ld, 1,
                     weights.w_v + head * d, ld, value, wide);
      T* rows = heads + head * d * ld;
      for (int64_t m = 0; m < d; ++m)
        for (int64_t i = 0; i < ld; ++i) rows[m * ld + i] = weights.v_bias[head * ld + i];
      row_product<T>(nullptr, true, d, d, ld, value, wide, 1, weights.w_out + head * d * ld, ld,
                     rows, ld);
    }
    row_product<T>(nullptr, false, c, c, ld, weights.w_q, 1, c, heads, ld, matrix, ld);
    for (int64_t i = 0; i < ld; ++i) offset[i] = weights.b_out[i];
    row_product<T>(nullptr, true, 1, c, ld, weights.b_q, c, 1, heads, ld, offset, ld);
    pack_panels(matrix, ld, 1, c, ld, panels);
  }

  const LinearAttentionParams& p;
  const Weights<S>& weights;
  const WindowGeometry& g;
  const int64_t c, ld, d, height, width;
  const int64_t row;  // of pixels, with the halo
  Scratch scratch;
  T *x, *t, *u;  // pixels: x and W0 x + b0 with the halo, and u
  T* line;       // one row of the window's pixels
  T *state, *heads, *matrix, *panels, *value;
  T *highest, *sum, *offset;
};

template <typename S>
void forward(const LinearAttentionParams& p, ParallelFor parallel) {
  const Weights<S> weights(p);
  const int64_t windows = p.batch * p.geometry.windows_h() * p.geometry.windows_w();
  parallel_for(parallel, windows, [&](int64_t begin, int64_t end) {
    Worker<S> worker(p, weights);
    for (int64_t index = begin; index < end; ++index) worker.run(index);
  });
}

}  // namespace

void linear_attention_block(const LinearAttentionParams& params, ParallelFor parallel) {
  dispatch_scalar(params.kind, [&](auto element) { forward<decltype(element)>(params, parallel); });
}

}  // namespace SR_KERNELS_ISA
}  // namespace sr_kernels
