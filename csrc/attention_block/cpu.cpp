// ELAN's attention block on the CPU, inference only.
//
//   q0 v0 q1 v1 ... = W_in x + b_in,   a_g = softmax(q_g q_g^T) v_g inside each window of group g,
//   y = W_out a + b_out + x
#include "attention_block/params.h"

#include "common/row_product.h"
#include "common/simd.h"
#include "common/tiling.h"
#include "window_attention/window_tile.h"

namespace sr_kernels {
namespace SR_KERNELS_ISA {
namespace {

constexpr int64_t kTilePixels = 256;  // pixels of a tile of windows, at least one window
constexpr int64_t kBlock = 64;        // tokens a side of a block of scores

// A score tile is a square of kSquare tokens: whole vectors, and accumulators enough to cover the
// latency of a multiplication.
template <typename T>
constexpr int kStrips = Simd<T>::width >= 8 ? 1 : 8 / Simd<T>::width;
template <typename T>
constexpr int kSquare = kStrips<T> * Simd<T>::width;

// One shift for all rows of a window serves while no row's maximum, which is at least |q_i|^2, lies
// further below it: what exp then drops is below exp(50 - 87) of the row's sum.
constexpr int kMaxSpread = 50;

// The square of keys [j0, j0 + kSquare) and queries [i0, i0 + kSquare) of one window:
//   e[j][i] = exp(q_j . q_i - shift),  sum_i[i] += sum_j e[j][i]
// and, unless mirror is nullptr, the same with j and i exchanged: mirror[i][j] = e[j][i],
// sum_j[j] += sum_i e[j][i]. Tokens from n on count as zero. d x ld is q.
template <typename T>
SR_INLINE void score_square(const T* q, int64_t ld, int64_t d, int64_t n, int64_t j0, int64_t i0,
                            T shift, T* e, T* mirror, T* sum) {
  constexpr int W = Simd<T>::width, kRows = kSquare<T>;
#pragma GCC unroll 8
  for (int strip = 0; strip < kStrips<T>; ++strip) {
    const int64_t i = i0 + strip * W;
    Vec<T> acc[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) acc[r] = Vec<T>{};
    for (int64_t k = 0; k < d; ++k) {
      const Vec<T> right = load(q + k * ld + i);
      const T* left = q + k * ld + j0;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) acc[r] += broadcast(left[r]) * right;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) acc[r] = exp_nonpositive(acc[r] - shift);
    if (j0 + kRows > n || i + W > n) {
      for (int r = 0; r < kRows; ++r)
        for (int l = 0; l < W; ++l)
          if (j0 + r >= n || i + l >= n) acc[r][l] = T(0);
    }
    Vec<T> total = acc[0];
#pragma GCC unroll 16
    for (int r = 1; r < kRows; ++r) total += acc[r];
    store<T>(sum + i, load(sum + i) + total);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) store<T>(e + r * kBlock + strip * W, acc[r]);
    if (mirror == nullptr) continue;
#pragma GCC unroll 8
    for (int part = 0; part < kStrips<T>; ++part) {
      Vec<T> square[W];
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) square[l] = acc[part * W + l];
      transpose<T>(square);
      total = square[0];
#pragma GCC unroll 16
      for (int l = 1; l < W; ++l) total += square[l];
      store<T>(sum + j0 + part * W, load(sum + j0 + part * W) + total);
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l)
        store<T>(mirror + (strip * W + l) * kBlock + part * W, square[l]);
    }
  }
}

// Scratch of attend().
template <typename T>
struct Softmax {
  static int64_t bytes(int64_t stride) {
    return 2 * Scratch::bytes_for<T>(kBlock * kBlock) + 2 * Scratch::bytes_for<T>(stride) +
           Scratch::bytes_for<T>(stride * strip());
  }
  static int64_t strip() { return 4 * Simd<T>::width; }
  Softmax(Scratch& scratch, int64_t stride)
      : e(scratch.take<T>(kBlock * kBlock)),
        mirror(scratch.take<T>(kBlock * kBlock)),
        sum(scratch.take<T>(stride)),
        norm(scratch.take<T>(stride)),
        column(scratch.take<T>(stride * strip())) {}
  T *e, *mirror, *sum, *norm, *column;
};

// Whether one shift serves the window (see kMaxSpread), and which: its largest logit, which by
// Cauchy and Schwarz is the largest |q_i|^2.
template <typename T>
bool one_shift(const T* q, int64_t ld, int64_t d, int64_t n, T* norm, T* shift) {
  constexpr int W = Simd<T>::width;
  for (int64_t i = 0; i < n; i += W) {
    Vec<T> sum{};
    for (int64_t k = 0; k < d; ++k) {
      const Vec<T> value = load(q + k * ld + i);
      sum += value * value;
    }
    store<T>(norm + i, sum);
  }
  T lowest = norm[0], highest = norm[0];
  bool ordered = true;
  for (int64_t i = 0; i < n; ++i) {
    lowest = norm[i] < lowest ? norm[i] : lowest;
    highest = norm[i] > highest ? norm[i] : highest;
    ordered &= norm[i] == norm[i];
  }
  *shift = highest;
  return ordered && highest - lowest <= T(kMaxSpread);  // false where highest is infinite
}

// out = softmax(q q^T) v for one window of n tokens; q, v, out are d x ld, padded to kSquare tokens.
template <typename T>
void attend(const Softmax<T>& s, const T* q, const T* v, int64_t d, int64_t n, int64_t ld, T* out) {
  constexpr int W = Simd<T>::width, kSide = kSquare<T>;
  const int64_t stride = ceil_div(n, kSide) * kSide;
  T shift;
  if (one_shift(q, ld, d, n, s.norm, &shift)) {
    for (int64_t i = 0; i < stride; ++i) s.sum[i] = T(0);
    for (int64_t j0 = 0; j0 < stride; j0 += kBlock) {
      const int64_t rows = min64(kBlock, stride - j0);
      for (int64_t i0 = j0; i0 < stride; i0 += kBlock) {
        const int64_t columns = min64(kBlock, stride - i0);
        const bool diagonal = i0 == j0;
        T* mirror = diagonal ? s.e : s.mirror;
        for (int64_t j = 0; j < rows; j += kSide)
          for (int64_t i = diagonal ? j : 0; i < columns; i += kSide)
            score_square<T>(q, ld, d, n, j0 + j, i0 + i, shift, s.e + j * kBlock + i,
                            diagonal && i == j ? nullptr : mirror + i * kBlock + j, s.sum);
        row_product<T>(nullptr, j0 > 0, d, min64(rows, n - j0), columns, v + j0, ld, 1, s.e, kBlock,
                       out + i0, ld);
        if (!diagonal)
          row_product<T>(nullptr, true, d, min64(columns, n - i0), rows, v + i0, ld, 1, s.mirror,
                         kBlock, out + j0, ld);
      }
    }
  } else {
    const int64_t strip = Softmax<T>::strip();
    const ScoreTerms<T> terms{T(1), nullptr, BiasBands(WindowGeometry{}), nullptr};
    for (int64_t i0 = 0; i0 < stride; i0 += strip) {
      const int64_t columns = min64(strip, stride - i0);
      score_block(terms, q, q, d, n, ld, i0, columns, s.column, strip, s.norm + i0, s.sum + i0);
      for (int64_t j0 = 0; j0 < n; j0 += kBlock)
        row_product<T>(nullptr, j0 > 0, d, min64(kBlock, n - j0), columns, v + j0, ld, 1,
                       s.column + j0 * strip, strip, out + i0, ld);
    }
  }
  for (int64_t i = 0; i < stride; i += W) {
    const Vec<T> factor = 1 / load(s.sum + i);
    for (int64_t c = 0; c < d; ++c)
      store<T>(out + c * ld + i, load(out + c * ld + i) * factor);
  }
}

// A dense matrix or vector as compute elements: where it lies, or else copied.
template <typename S, typename T>
const T* view_or_copy(const void* source, int64_t count, Scratch& scratch) {
  if constexpr (std::is_same_v<S, T>) {
    return static_cast<const S*>(source);
  } else {
    return load_vector<S>(source, count, scratch.take<T>(count));
  }
}

// a of one group, into y's channels.
template <typename S>
void attend_group(const AttentionBlockParams& p, int64_t group, ParallelFor parallel) {
  using T = typename Compute<S>::type;
  const WindowGeometry& geometry = p.geometry[group];
  const int64_t d = p.channels / p.groups, n = geometry.tokens();
  const int64_t stride = ceil_div(n, kSquare<T>) * kSquare<T>;
  const int64_t count = p.batch * geometry.windows_h() * geometry.windows_w();
  const int64_t at_once = max64(1, kTilePixels / stride);  // windows of a tile
  const int64_t ld = spread_stride<T>(at_once * stride);
  const int64_t rows = p.reuse ? d : 2 * d;  // of W_in
  Scratch weights(Scratch::bytes_for<T>(rows * p.channels) + Scratch::bytes_for<T>(rows));
  const S* w_in = static_cast<const S*>(p.w_in) + group * rows * p.channels;
  const S* b_in = p.b_in == nullptr ? nullptr : static_cast<const S*>(p.b_in) + group * rows;
  const T* weight = view_or_copy<S, T>(w_in, rows * p.channels, weights);
  const T* bias = view_or_copy<S, T>(b_in, rows, weights);
  parallel_for(parallel, ceil_div(count, at_once), [&](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::bytes_for<T>(p.channels * ld) + 3 * Scratch::bytes_for<T>(d * ld) +
                    Softmax<T>::bytes(stride));
    T* x = scratch.take<T>(p.channels * ld);
    T* qv = scratch.take<T>(2 * d * ld);
    T* out = scratch.take<T>(d * ld);
    const Softmax<T> softmax(scratch, stride);
    T *q = qv, *v = qv + d * ld;
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * at_once, windows = min64(at_once, count - first);
      for (int64_t w = 0; w < windows; ++w) {
        const WindowPosition window(geometry, first + w);
        gather<S>(p.x, 0, p.channels, geometry, window, x + w * stride, ld, 1);
        if (p.reuse) gather<S>(p.q, group * d, d, geometry, window, q + w * stride, ld, 1);
      }
      row_product<T>(bias, false, rows, p.channels, windows * stride, weight, p.channels, 1, x, ld,
                     p.reuse ? v : q, ld);
      for (int64_t w = 0; w < windows; ++w)
        attend(softmax, q + w * stride, v + w * stride, d, n, ld, out + w * stride);
      for (int64_t w = 0; w < windows; ++w) {
        const WindowPosition window(geometry, first + w);
        if (!p.reuse && p.q.data != nullptr)
          scatter<S>(q + w * stride, ld, p.q, group * d, d, geometry, window);
        scatter<S>(out + w * stride, ld, p.y, group * d, d, geometry, window);
      }
    }
  });
}

// y = W_out y + b_out + x
template <typename S>
void project_out(const AttentionBlockParams& p, ParallelFor parallel) {
  using T = typename Compute<S>::type;
  FeatureMap x = p.x, y = p.y;
  const PixelRows image(p.height, p.width, {&x, &y});
  const Tiling tiling(p.batch, image.height, image.width, 1, run_length<T>(2 * p.channels));
  const int64_t ld = spread_stride<T>(tiling.columns), c = p.channels;
  Scratch weights(Scratch::bytes_for<T>(c * c) + Scratch::bytes_for<T>(c));
  const T* weight = view_or_copy<S, T>(p.w_out, c * c, weights);
  const T* bias = view_or_copy<S, T>(p.b_out, c, weights);
  parallel_for(parallel, tiling.count(), [&](int64_t begin, int64_t end) {
    Scratch scratch(2 * Scratch::bytes_for<T>(c * ld));
    T* a = scratch.take<T>(c * ld);
    T* out = scratch.take<T>(c * ld);
    for (int64_t index = begin; index < end; ++index) {
      const Tile tile = tiling[index];
      load_tile<S>(y, tile.n, 0, c, tile.h, 1, tile.w, tile.columns, image.height, image.width, a,
                   ld, ld);
      row_product<T>(bias, false, c, c, padded<T>(tile.columns), weight, c, 1, a, ld, out, ld);
      load_tile<S>(x, tile.n, 0, c, tile.h, 1, tile.w, tile.columns, image.height, image.width, a,
                   ld, ld);
      for (int64_t i = 0; i < c * ld; i += Simd<T>::width)
        store<T>(out + i, load(out + i) + load(a + i));
      store_tile<S>(out, ld, ld, y, tile.n, 0, c, tile.h, 1, tile.w, tile.columns, image.height,
                    image.width);
    }
  });
}

}  // namespace

void attention_block(const AttentionBlockParams& params, ParallelFor parallel) {
  dispatch_scalar(params.kind, [&](auto element) {
    using S = decltype(element);
    for (int64_t group = 0; group < params.groups; ++group)
      attend_group<S>(params, group, parallel);
    project_out<S>(params, parallel);
  });
}

}  // namespace SR_KERNELS_ISA
}  // namespace sr_kernels
