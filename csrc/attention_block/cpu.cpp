// ELAN's attention block on the CPU, inference only.
//
//   q0 v0 q1 v1 ... = W_in x + b_in,   a_g = softmax(q_g q_g^T) v_g inside each window of group g,
//   y = W_out a + b_out + x
//
// All groups take their windows from one square of the image (16 x 16 pixels for windows of 4, 8
// and 16), whose x is read once; q, v, scores and a stay in the caches. Unshifted windows of all
// sizes fill the square: x goes in and y comes out. Shifted by half their sides they do not nest,
// and a pixel's a is complete only after its neighbours' squares: a passes through y's memory, and
// W_out is a second pass over it. Windows that share no square of 8 to 32 pixels are done group by
// group.
//
// A window's scores are symmetric: half of them are computed
// (window_attention/symmetric_softmax.h).
//
// Floor, float32, C = 60, per pixel: 240 B in, 240 B out, and 240 B for q where it is handed
// on; 48.5 kFLOP, of which 6 are saved by symmetry; 336 exponentials, of which 150 are. With q
// given 41 kFLOP. Bound by arithmetic: 31 ms (26 ms with q given) for 192 x 320 pixels at the 90
// GFLOP/s that a large matrix product reaches on one core of an AMD EPYC (Zen 3, AVX2),
// exponentials on top: 5 ms foreseen. Measured there on 2026-11-21, one thread, channels_last: 43
// ms unshifted, 47 ms shifted; 38 and 43 ms with q given. The products of W_in, v and W_out run at
// the matrix product's speed (23 ms); scores with their numerators take 11 ms where 9 were
// foreseen, since a square of eight rows and one vector needs nine loads for eight multiplications;
// the rest is moving x, q and a between pixel order and window order. A contiguous image of a width
// that makes planes a multiple of 4 KiB apart, as this one, costs 6 ms more: all channels of a
// pixel share one set of the cache.
#include "attention_block/params.h"

#include "common/row_product.h"
#include "common/simd.h"
#include "common/tiling.h"
#include "window_attention/symmetric_softmax.h"
#include "window_attention/window_tile.h"

namespace sr_kernels {
namespace SR_KERNELS_ISA {
namespace {

constexpr int64_t kTilePixels = 256;  // pixels of a tile of windows, at least one window

// ------------------------------------------------------------------ tiles

// Weights as compute elements.
template <typename S>
struct Weights {
  using T = typename Compute<S>::type;
  int64_t rows;  // of W_in for one group
  Scratch scratch;
  const T *w_in, *b_in, *w_out, *b_out;

  explicit Weights(const AttentionBlockParams& p)
      : rows((p.reuse ? 1 : 2) * p.channels / p.groups),
        scratch(Scratch::bytes_for<T>(rows * p.groups * p.channels) +
                Scratch::bytes_for<T>(rows * p.groups) +
                Scratch::bytes_for<T>(p.channels * p.channels) + Scratch::bytes_for<T>(p.channels)),
        w_in(copy(p.w_in, rows * p.groups * p.channels)),
        b_in(copy(p.b_in, rows * p.groups)),
        w_out(copy(p.w_out, p.channels * p.channels)),
        b_out(copy(p.b_out, p.channels)) {}

 private:
  const T* copy(const void* source, int64_t count) {
    return load_vector<S>(source, count, scratch.template take<T>(count));
  }
};

// The queries of one window between two calls: [group][window][channel][token].
template <typename S>
SR_INLINE S* saved_queries(const AttentionBlockParams& p, int64_t group,
                           const WindowPosition& window) {
  const WindowGeometry& geometry = p.geometry[group];
  const int64_t index =
      (window.n * geometry.windows_h() + window.a) * geometry.windows_w() + window.b;
  const int64_t pixels = group * p.batch * p.height * p.width + index * geometry.tokens();
  return static_cast<S*>(p.q) + p.channels / p.groups * pixels;
}
template <typename S, typename T>
void save_queries(const AttentionBlockParams& p, int64_t group, const WindowPosition& window,
                  const T* q, int64_t ld) {
  const int64_t d = p.channels / p.groups, n = p.geometry[group].tokens();
  S* saved = saved_queries<S>(p, group, window);
  for (int64_t c = 0; c < d; ++c) store_elements(q + c * ld, n, saved + c * n, 1);
}
template <typename S, typename T>
void load_queries(const AttentionBlockParams& p, int64_t group, const WindowPosition& window, T* q,
                  int64_t ld) {
  const int64_t d = p.channels / p.groups, n = p.geometry[group].tokens();
  const S* saved = saved_queries<S>(p, group, window);
  for (int64_t c = 0; c < d; ++c) load_elements(saved + c * n, 1, n, q + c * ld);
}

// A few windows of one group: x gathered in the order of their tokens, then q and v, then a. The
// groups of a call take turns in the same memory.
template <typename S>
struct GroupTile {
  using T = typename Compute<S>::type;
  int64_t d, n, stride, ld;  // channels, tokens of a window, the same padded, a row of the tile
  T *x, *q, *v, *out;
  SymmetricSoftmax<T> softmax;

  static int64_t padded_tokens(int64_t n) { return ceil_div(n, kSquare<T>) * kSquare<T>; }
  static int64_t row(int64_t n, int64_t windows) {
    return spread_stride<T>(windows * padded_tokens(n));
  }
  // Elements that tiles need whose padded_tokens() and row() are at most these.
  static int64_t elements(const AttentionBlockParams& p, int64_t stride, int64_t ld) {
    return (p.channels + 3 * p.channels / p.groups) * ld + SymmetricSoftmax<T>::elements(stride);
  }
  GroupTile(const AttentionBlockParams& p, int64_t n_, int64_t windows, T* memory)
      : d(p.channels / p.groups),
        n(n_),
        stride(padded_tokens(n_)),
        ld(row(n_, windows)),
        x(memory),
        q(x + p.channels * ld),
        v(q + d * ld),
        out(v + d * ld),
        softmax(out + d * ld, stride) {}

  // The group's q and v of x, or v alone; then softmax(q q^T) v into out.
  void run(const AttentionBlockParams& p, const Weights<S>& weights, int64_t group,
           int64_t windows) const {
    const T* bias = weights.b_in == nullptr ? nullptr : weights.b_in + group * weights.rows;
    row_product<T>(bias, false, weights.rows, p.channels, windows * stride,
                   weights.w_in + group * weights.rows * p.channels, p.channels, 1, x, ld,
                   p.reuse ? v : q, ld);
    for (int64_t w = 0; w < windows; ++w)
      attend<T>(softmax, q + w * stride, d, v + w * stride, d, n, ld, out + w * stride, nullptr);
  }
};

// a of one group, into y's channels. Any windows.
template <typename S>
void attend_group(const AttentionBlockParams& p, const Weights<S>& weights, int64_t group,
                  ParallelFor parallel) {
  using T = typename Compute<S>::type;
  using Tile = GroupTile<S>;
  const WindowGeometry& geometry = p.geometry[group];
  const int64_t d = p.channels / p.groups, n = geometry.tokens();
  const int64_t count = p.batch * geometry.windows_h() * geometry.windows_w();
  const int64_t at_once = max64(1, kTilePixels / Tile::padded_tokens(n));
  parallel_for(parallel, ceil_div(count, at_once), [&](int64_t begin, int64_t end) {
    const int64_t elements = Tile::elements(p, Tile::padded_tokens(n), Tile::row(n, at_once));
    Scratch scratch(Scratch::bytes_for<T>(elements));
    const Tile tile(p, n, at_once, scratch.take<T>(elements));
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index * at_once, windows = min64(at_once, count - first);
      for (int64_t w = 0; w < windows; ++w) {
        const WindowPosition window(geometry, first + w);
        gather<S>(p.x, 0, p.channels, geometry, window, tile.x + w * tile.stride, tile.ld, 1);
        if (p.reuse) load_queries<S>(p, group, window, tile.q + w * tile.stride, tile.ld);
      }
      tile.run(p, weights, group, windows);
      for (int64_t w = 0; w < windows; ++w) {
        const WindowPosition window(geometry, first + w);
        if (!p.reuse && p.q != nullptr)
          save_queries<S>(p, group, window, tile.q + w * tile.stride, tile.ld);
        scatter<S>(tile.out + w * tile.stride, tile.ld, p.y, group * d, d, geometry, window);
      }
    }
  });
}

// y = W_out y + b_out + x, channel by channel.
template <typename S>
void project_out_planes(const AttentionBlockParams& p, const Weights<S>& weights,
                        ParallelFor parallel) {
  using T = typename Compute<S>::type;
  FeatureMap x = p.x, y = p.y;
  const PixelRows image(p.height, p.width, {&x, &y});
  const Tiling tiling(p.batch, image.height, image.width, 1, run_length<T>(2 * p.channels));
  const int64_t ld = spread_stride<T>(tiling.columns), c = p.channels;
  parallel_for(parallel, tiling.count(), [&](int64_t begin, int64_t end) {
    Scratch scratch(2 * Scratch::bytes_for<T>(c * ld));
    T* a = scratch.take<T>(c * ld);
    T* out = scratch.take<T>(c * ld);
    for (int64_t index = begin; index < end; ++index) {
      const Tile tile = tiling[index];
      load_tile<S>(y, tile.n, 0, c, tile.h, 1, tile.w, tile.columns, image.height, image.width, a,
                   ld, ld);
      row_product<T>(weights.b_out, false, c, c, padded<T>(tile.columns), weights.w_out, c, 1, a,
                     ld, out, ld);
      load_tile<S>(x, tile.n, 0, c, tile.h, 1, tile.w, tile.columns, image.height, image.width, a,
                   ld, ld);
      for (int64_t i = 0; i < c * ld; i += Simd<T>::width)
        store<T>(out + i, load(out + i) + load(a + i));
      store_tile<S>(out, ld, ld, y, tile.n, 0, c, tile.h, 1, tile.w, tile.columns, image.height,
                    image.width);
    }
  });
}

// The same pixel by pixel, where the channels of one lie side by side and need no conversion: a is
// the left operand as it is in memory, and W_out, transposed, the right one.
template <typename T>
void project_out_pixels(const AttentionBlockParams& p, const Weights<T>& weights,
                        ParallelFor parallel) {
  FeatureMap x = p.x, y = p.y;
  const PixelRows image(p.height, p.width, {&x, &y});
  const int64_t c = p.channels, ld = padded<T>(c);
  const Tiling tiling(p.batch, image.height, image.width, 1, run_length<T>(2 * ld));
  Scratch shared(Scratch::bytes_for<T>(c * ld) + Scratch::bytes_for<T>(ld));
  T* weight = shared.take<T>(c * ld);
  T* bias = shared.take<T>(ld);
  transpose_block(weights.w_out, c, c, c, weight, ld, true);
  for (int64_t k = 0; weights.b_out != nullptr && k < c; ++k) bias[k] = weights.b_out[k];
  parallel_for(parallel, tiling.count(), [&](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::bytes_for<T>(tiling.columns * ld));
    T* out = scratch.take<T>(tiling.columns * ld);
    for (int64_t index = begin; index < end; ++index) {
      const Tile tile = tiling[index];
      const T* residual = at<T>(x, tile.n, 0, tile.h, tile.w);
      T* target = at<T>(y, tile.n, 0, tile.h, tile.w);
      row_product<T>(nullptr, false, tile.columns, c, ld, target, y.stride_w, 1, weight, ld, out,
                     ld);
      for (int64_t i = 0; i < tile.columns; ++i)
        sweep<T>(c, [&](int64_t k, auto v) {
          using V = decltype(v);
          put<V>(target + i * y.stride_w + k, get<V>(out + i * ld + k) + get<V>(bias + k) +
                                                  get<V>(residual + i * x.stride_w + k));
        });
    }
  });
}

template <typename S>
void project_out(const AttentionBlockParams& p, const Weights<S>& weights, ParallelFor parallel) {
  if constexpr (std::is_same_v<S, typename Compute<S>::type>) {
    if (is_channels_last(p.x) && is_channels_last(p.y))
      return project_out_pixels<S>(p, weights, parallel);
  }
  project_out_planes<S>(p, weights, parallel);
}

// ------------------------------------------------------------------ squares

// Where a side that every window divides is not too long, all groups take their windows from one
// square of that side: x is read once for all of them. Shifted windows of different sides do not
// nest; each group's square then lies a little elsewhere, and x is read for all that they cover.
struct Squares {
  int64_t side = 0;    // 0: there is none
  int64_t origin = 0;  // pixels from a square's place in the unshifted grid to the first row read
  int64_t reach = 0;   // rows and columns read
  int64_t last = 0;    // the largest shift

  explicit Squares(const AttentionBlockParams& p) {
    int64_t multiple = 1;
    for (int64_t g = 0; g < p.groups; ++g) {
      const int64_t window = p.geometry[g].window_h;
      int64_t a = multiple, b = window;
      while (b != 0) {
        const int64_t rest = a % b;
        a = b;
        b = rest;
      }
      multiple *= window / a;
      if (multiple > kMaxSide) return;
      last = max64(last, p.geometry[g].shift_h);
    }
    if (multiple < kMinSide) return;
    side = multiple;
    origin = last;
    for (int64_t g = 0; g < p.groups; ++g) origin = min64(origin, offset(p.geometry[g]));
    reach = last - origin + side;
  }
  // The group's first window lies so many pixels from the square's place: the largest number up to
  // `last` at which one of its windows begins.
  int64_t offset(const WindowGeometry& geometry) const {
    return last - (last - geometry.shift_h) % geometry.window_h;
  }

  static constexpr int64_t kMinSide = 8, kMaxSide = 32;
};

// Calls visit(h, w, count, offset) for every run of pixels in rows [h0, h0 + side) and columns [w0,
// w0 + side), which go around the image; offset is the first one's in a tile whose rows are
// row_stride apart.
template <typename Visit>
SR_INLINE void for_each_run_around(const AttentionBlockParams& p, int64_t h0, int64_t w0,
                                   int64_t side, int64_t row_stride, const Visit& visit) {
  for (int64_t r = 0; r < side; ++r)
    for (int64_t column = 0; column < side;) {
      const int64_t w = (w0 + column) % p.width, count = min64(side - column, p.width - w);
      visit((h0 + r) % p.height, w, count, r * row_stride + column);
      column += count;
    }
}

// The whole block where no window is shifted, else a into y.
template <typename S>
void attend_squares(const AttentionBlockParams& p, const Weights<S>& weights,
                    const Squares& squares, ParallelFor parallel) {
  using T = typename Compute<S>::type;
  using Tile = GroupTile<S>;
  constexpr int64_t kOutRows = 4;  // of a square, that the way out takes at a time
  const int64_t side = squares.side, reach = squares.reach, c = p.channels, d = c / p.groups;
  const int64_t squares_h = p.height / side, squares_w = p.width / side;
  const bool shifted = squares.last > 0;
  const int64_t row = ceil_div(reach, 4) * 4, ld = spread_stride<T>(reach * row);
  const int64_t out_ld = spread_stride<T>(kOutRows * row);
  int64_t stride = 0, tile_ld = 0;
  for (int64_t g = 0; g < p.groups; ++g) {
    const int64_t n = p.geometry[g].tokens();
    stride = max64(stride, Tile::padded_tokens(n));
    tile_ld = max64(tile_ld, Tile::row(n, side * side / n));
  }
  const int64_t elements = Tile::elements(p, stride, tile_ld);
  parallel_for(parallel, p.batch * squares_h * squares_w, [&](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::bytes_for<T>(elements) + 2 * Scratch::bytes_for<T>(c * ld) +
                    Scratch::bytes_for<T>(c * out_ld));
    T* memory = scratch.take<T>(elements);
    T* x = scratch.take<T>(c * ld);
    T* a = scratch.take<T>(c * ld);
    T* out = scratch.take<T>(c * out_ld);
    const FeatureMap x_map{x, 0, ld, row, 1}, a_map{a, 0, ld, row, 1};
    for (int64_t index = begin; index < end; ++index) {
      const int64_t w0 = index % squares_w * side, h0 = index / squares_w % squares_h * side;
      const int64_t n = index / (squares_h * squares_w);
      for_each_run_around(p, h0 + squares.origin, w0 + squares.origin, reach, row,
                          [&](int64_t h, int64_t w, int64_t count, int64_t offset) {
                            load_tile<S>(p.x, n, 0, c, h, 1, w, count, p.height, p.width,
                                         x + offset, ld, count);
                          });
      for (int64_t g = 0; g < p.groups; ++g) {
        const WindowGeometry& image = p.geometry[g];
        const int window = image.window_h;
        const int64_t a_side = side / window, windows = a_side * a_side;
        const int64_t offset = squares.offset(image);
        const int64_t first_a = (h0 + offset - image.shift_h) / window;
        const int64_t first_b = (w0 + offset - image.shift_h) / window;
        // The same windows in x and a, which are wide enough that nothing goes around them.
        const int64_t within = offset - squares.origin;
        const WindowGeometry local{2 * reach, 2 * reach, window, window, within, within};
        Tile tile(p, image.tokens(), windows, memory);
        // One window as large as what was read lies there in the order of its tokens.
        const bool in_order = window == reach && window == row && tile.ld == ld;
        if (in_order) tile.x = x;
        const auto for_each_window = [&](const auto& visit) {
          for (int64_t w = 0; w < windows; ++w) {
            const int64_t i = w / a_side, j = w % a_side;
            visit(WindowPosition(local, 0, i, j),
                  WindowPosition(image, n, (first_a + i) % image.windows_h(),
                                 (first_b + j) % image.windows_w()),
                  w * tile.stride);
          }
        };
        for_each_window([&](const WindowPosition& here, const WindowPosition& there, int64_t at) {
          if (!in_order) gather<T>(x_map, 0, c, local, here, tile.x + at, tile.ld, 1);
          if (p.reuse) load_queries<S>(p, g, there, tile.q + at, tile.ld);
        });
        tile.run(p, weights, g, windows);
        for_each_window([&](const WindowPosition& here, const WindowPosition& there, int64_t at) {
          if (!p.reuse && p.q != nullptr) save_queries<S>(p, g, there, tile.q + at, tile.ld);
          scatter<T>(tile.out + at, tile.ld, a_map, g * d, d, local, here);
        });
        if (shifted)
          for_each_run_around(p, h0 + offset, w0 + offset, side, row,
                              [&](int64_t h, int64_t w, int64_t count, int64_t at) {
                                store_tile<S>(a + g * d * ld + within * (row + 1) + at, ld, count,
                                              p.y, n, g * d, d, h, 1, w, count, p.height, p.width);
                              });
      }
      if (shifted) continue;
      for (int64_t r = 0; r < side; r += kOutRows) {
        const int64_t rows = min64(kOutRows, side - r), first = r * row;
        row_product<T>(weights.b_out, false, c, c, padded<T>(rows * row), weights.w_out, c, 1,
                       a + first, ld, out, out_ld);
        for (int64_t k = 0; k < c; ++k)
          for (int64_t i = 0; i < rows * row; ++i) out[k * out_ld + i] += x[k * ld + first + i];
        store_tile<S>(out, out_ld, row, p.y, n, 0, c, h0 + r, rows, w0, side, p.height, p.width);
      }
    }
  });
}

}  // namespace

void attention_block(const AttentionBlockParams& params, ParallelFor parallel) {
  dispatch_scalar(params.kind, [&](auto element) {
    using S = decltype(element);
    const Weights<S> weights(params);
    const Squares squares(params);
    if (squares.side > 0) {
      attend_squares<S>(params, weights, squares, parallel);
    } else {
      for (int64_t group = 0; group < params.groups; ++group)
        attend_group<S>(params, weights, group, parallel);
    }
    if (squares.side == 0 || squares.last > 0) project_out<S>(params, weights, parallel);
  });
}

}  // namespace SR_KERNELS_ISA
}  // namespace sr_kernels
