// A 3x3 convolution on the CPU, inference only: Winograd's F(2x2, 3x3).
//
//   y = act(conv2d(x, w, padding=1) + bias + skip)
//
// A tile is 2x2 outputs and the 4x4 inputs d that they see:
//
//   y = A^T m A,   m[f] = sum over input channels of (G w G^T)[f] (B^T d B)[f],   f < 16
//
// with the matrices of docs/operators.md: 16 multiplications a pair of channels where the formula
// has 36. A strip of 24 tiles at a time, wherever they lie: its inputs are transformed into v, per
// frequency f tiles x c_in; m = v u is 16 matrix products, u = G w G^T being made anew at each call
// (50 us for 52 channels: 3 in a thousand at 180 x 320, a quarter at 24 x 24); m is transformed
// into y. v and m stay in L2. Vectors run along channels, as a channels_last image has them; tiles
// at the border, other layouts and other dtypes pass through a copy in that order.
//
// Only sums and differences are added to the direct convolution's work: float32's largest error is
// a third of its. A NaN reaches the same outputs.
//
// Floor, float32, per pixel: 4 (c_in + c_out) bytes, and 4 c_out for skip; 8 c_in c_out FLOP in the
// products, c_out rounded up to whole vectors, where the formula has 18. Bound by arithmetic: at
// the 90 GFLOP/s that a large matrix product reaches on one core of an AMD EPYC (Zen 3, AVX2),
// 14.9 ms for 180 x 320 pixels of 52 channels, and 1.2 ms foreseen for the transforms. Measured
// there on 2026-11-21, one thread, channels_last: 18.1 ms, a fraction of 0.82 (48 channels: 0.80,
// 60: 0.83, 64: 0.85, 180: 0.84). The products run at the matrix product's speed; the transforms
// take 3.5 ms, which neither the length of a strip nor prefetching changed. The direct convolution
// of oneDNN takes 31.5 ms in the same run. Contiguous images cost 1 to 3 ms more: a strip's four
// rows are turned, each row for two rows of tiles.
#include "conv3x3/params.h"

#include "common/activate_vectors.h"
#include "common/simd.h"
#include "common/tiling.h"

namespace sr_kernels {
namespace SR_KERNELS_ISA {
namespace {

constexpr int kFrequencies = 16;

// ------------------------------------------------------------------ the product of a frequency

// Vectors of C_out that a register tile has at most, and its rows for V of them. kRowMultiple is a
// multiple of every number of rows.
#if defined(__AVX512F__)
constexpr int kMaxVectors = 4;
constexpr int rows_of(int vectors) { return vectors > 2 ? 6 : 12; }
#elif defined(__AVX2__)
constexpr int kMaxVectors = 3;
constexpr int rows_of(int vectors) { return vectors == 1 ? 6 : 12 / vectors; }
#else
constexpr int kMaxVectors = 2;
constexpr int rows_of(int vectors) { return vectors == 1 ? 6 : 4; }
#endif
constexpr int64_t kRowMultiple = 12;
constexpr int64_t kStrip = 2 * kRowMultiple;  // tiles that are transformed and multiplied together

// C_out in groups of at most kMaxVectors vectors, all nearly equally wide.
template <typename T>
struct ColumnGroups {
  int64_t vectors, count;
  explicit ColumnGroups(int64_t c_out)
      : vectors(ceil_div(c_out, Simd<T>::width)), count(ceil_div(vectors, kMaxVectors)) {}
  SR_INLINE int64_t begin(int64_t group) const { return vectors * group / count * Simd<T>::width; }
  SR_INLINE int64_t width(int64_t group) const { return begin(group + 1) - begin(group); }
};

// rows_of(V) rows of M = V U; b is k_count rows of V vectors, one behind the other.
template <typename T, int V>
SR_INLINE void frequency_tile(int64_t k_count, const T* a, int64_t lda, const T* b, T* c,
                              int64_t ldc) {
  constexpr int W = Simd<T>::width, M = rows_of(V);
  const T* row[M];
  Vec<T> acc[M][V];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    row[i] = a + i * lda;
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) acc[i][j] = Vec<T>{};
  }
  for (int64_t k = 0; k < k_count; ++k, b += V * W) {
    Vec<T> column[V];
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) {
      Vec<T> value = load(b + j * W);
      keep_in_register(value);
      column[j] = value;
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const Vec<T> value = broadcast(row[i][k]);
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) acc[i][j] += value * column[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) store<T>(c + i * ldc + j * W, acc[i][j]);
}

// A function of its own: inlined, its pointers would not stay in registers.
template <typename T, int V>
__attribute__((noinline)) void frequency_columns(int64_t vectors, int64_t rows, int64_t k_count,
                                                 const T* a, int64_t lda, const T* b, T* c,
                                                 int64_t ldc) {
  if constexpr (V > 1) {
    if (vectors < V) return frequency_columns<T, V - 1>(vectors, rows, k_count, a, lda, b, c, ldc);
  }
  for (int64_t i = 0; i < rows; i += rows_of(V))
    frequency_tile<T, V>(k_count, a + i * lda, lda, b, c + i * ldc, ldc);
}

// ------------------------------------------------------------------ the transforms

// u[f][group][k][j] = (G g G^T)[f] of the weight from channel k to channel begin(group) + j; the
// padding's is left as it is. In float64, so that it is rounded once.
template <typename S, typename T>
void transform_weight(const FeatureMap& weight, int64_t c_in, int64_t c_out, int64_t k, T* u,
                      int64_t u_plane) {
  const ColumnGroups<T> groups(c_out);
  for (int64_t group = 0; group < groups.count; ++group) {
    const int64_t begin = groups.begin(group), width = groups.width(group);
    T* row = u + begin * c_in + k * width;
    for (int64_t j = 0; j < min64(width, c_out - begin); ++j) {
      double half[4][3];
      for (int s = 0; s < 3; ++s) {
        const auto g = [&](int r) {
          return double(to_compute(*at<S>(weight, begin + j, k, r, s)));
        };
        half[0][s] = g(0);
        half[1][s] = 0.5 * (g(0) + g(1) + g(2));
        half[2][s] = 0.5 * (g(0) - g(1) + g(2));
        half[3][s] = g(2);
      }
      for (int r = 0; r < 4; ++r) {
        const double* h = half[r];
        T* out = row + 4 * r * u_plane + j;
        out[0] = T(h[0]);
        out[u_plane] = T(0.5 * (h[0] + h[1] + h[2]));
        out[2 * u_plane] = T(0.5 * (h[0] - h[1] + h[2]));
        out[3 * u_plane] = T(h[2]);
      }
    }
  }
}

// Four rows of four pixels.
template <typename T>
struct Patch {
  const T* row[4];
  int64_t pixel;  // elements from a pixel to the next
};

// v[f][c] = (B^T d B)[f] of channel c, c < channels; channels is at least a vector.
template <typename T>
SR_INLINE void transform_input(const Patch<T>& patch, int64_t channels, T* v, int64_t v_plane) {
  constexpr int W = Simd<T>::width;
  for (int64_t c0 = 0; c0 < channels; c0 += W) {
    const int64_t c = min64(c0, channels - W);
    const auto d = [&](int i, int j) { return load(patch.row[i] + j * patch.pixel + c); };
    const auto finish = [&](int i, const Vec<T>* t) {
      T* out = v + 4 * i * v_plane + c;
      store<T>(out, t[0] - t[2]);
      store<T>(out + v_plane, t[1] + t[2]);
      store<T>(out + 2 * v_plane, t[2] - t[1]);
      store<T>(out + 3 * v_plane, t[1] - t[3]);
    };
    // Row by row: all at once would not fit into registers.
    Vec<T> sum[4], difference[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vec<T> d1 = d(1, j), d2 = d(2, j);
      sum[j] = d1 + d2;
      difference[j] = d2 - d1;
    }
    finish(1, sum);
    finish(2, difference);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) difference[j] = d(0, j) - d(2, j);
    finish(0, difference);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) difference[j] = d(1, j) - d(3, j);
    finish(3, difference);
  }
}

// Where a tile's outputs go, and what is added to them: the first pixel, and the distances.
template <typename T>
struct Outputs {
  T* y;
  int64_t y_row, y_pixel;
  const T* skip;
  int64_t skip_row, skip_pixel;
  int rows, columns;  // of two that exist
};

// y = act(A^T m A + bias + skip); channels is at least a vector.
template <typename T>
SR_INLINE void transform_output(const T* m, int64_t m_plane, const T* bias, Activation activation,
                                T slope, int64_t channels, const Outputs<T>& out) {
  constexpr int W = Simd<T>::width;
  for (int64_t c0 = 0; c0 < channels; c0 += W) {
    const int64_t c = min64(c0, channels - W);
    Vec<T> s[2][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const T* column = m + j * m_plane + c;
      const Vec<T> m1 = load(column + 4 * m_plane), m2 = load(column + 8 * m_plane);
      s[0][j] = load(column) + m1 + m2;
      s[1][j] = m1 - m2 - load(column + 12 * m_plane);
    }
    const Vec<T> b = load(bias + c);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      if (i >= out.rows) break;
      Vec<T> y[2] = {s[i][0] + s[i][1] + s[i][2] + b, s[i][1] - s[i][2] - s[i][3] + b};
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        if (j >= out.columns) break;
        if (out.skip != nullptr) y[j] += load(out.skip + i * out.skip_row + j * out.skip_pixel + c);
        T* target = out.y + i * out.y_row + j * out.y_pixel + c;
        store<T>(target, activate_in_epilogue(activation, slope, y[j]));
        if (!fits_in_epilogue(activation)) activate_row(activation, slope, target, W);
      }
    }
  }
}

// ------------------------------------------------------------------ pixels with their channels

// A rectangle of the image, pixel by pixel with all its channels, ld elements each; zero where it
// lies outside the image.
template <typename S, typename T>
void stage(const FeatureMap& map, int64_t channels, int64_t height, int64_t width, int64_t n,
           int64_t h0, int64_t rows, int64_t w0, int64_t columns, T* destination, int64_t ld) {
  const int64_t begin = max64(w0, 0), end = min64(w0 + columns, width);
  for (int64_t r = 0; r < rows; ++r, destination += columns * ld) {
    const int64_t h = h0 + r;
    const bool inside = h >= 0 && h < height && begin < end;
    const int64_t first = inside ? begin - w0 : columns, last = inside ? end - w0 : columns;
    std::memset(destination, 0, static_cast<size_t>(first * ld) * sizeof(T));
    std::memset(destination + last * ld, 0, static_cast<size_t>((columns - last) * ld) * sizeof(T));
    if (!inside) continue;
    const S* source = at<S>(map, n, 0, h, begin);
    if (map.stride_w == 1 && map.stride_c != 1) {
      transpose_block(source, map.stride_c, channels, last - first, destination + first * ld, ld,
                      true);
    } else {
      for (int64_t i = first; i < last; ++i)
        load_elements(source + (i - first) * map.stride_w, map.stride_c, channels,
                      destination + i * ld);
    }
  }
}

// The way back; what lies outside is dropped.
template <typename S, typename T>
void unstage(const T* source, int64_t ld, const FeatureMap& map, int64_t channels, int64_t height,
             int64_t width, int64_t n, int64_t h0, int64_t rows, int64_t w0, int64_t columns) {
  const int64_t count = min64(columns, width - w0);
  for (int64_t r = 0; r < min64(rows, height - h0); ++r, source += columns * ld) {
    S* destination = at<S>(map, n, 0, h0 + r, w0);
    if (map.stride_w == 1 && map.stride_c != 1) {
      transpose_block(source, ld, count, channels, destination, map.stride_c, false);
    } else {
      for (int64_t i = 0; i < count; ++i)
        store_elements(source + i * ld, channels, destination + i * map.stride_w, map.stride_c);
    }
  }
}

// Whether a map's pixels can be used where they are: whole vectors of channels.
template <typename S, typename T>
bool in_place(const FeatureMap& map, int64_t channels) {
  return std::is_same_v<S, T> && map.stride_c == 1 && channels >= Simd<T>::width;
}

// ------------------------------------------------------------------ the convolution

// A run of tiles in one row of tiles: `count` from column w of row h, in tiles.
struct TileRun {
  int64_t n, h, w, count;
};

template <typename S>
class Convolution {
 public:
  using T = typename Compute<S>::type;

  Convolution(const Conv3x3Params& params)
      : p(params),
        tiles_h(ceil_div(p.height, 2)),
        tiles_w(ceil_div(p.width, 2)),
        tiles(p.batch * tiles_h * tiles_w),
        v_ld(padded<T>(p.c_in)),
        m_ld(padded<T>(p.c_out)),
        u_plane(spread_stride<T>(p.c_in * m_ld)),
        strip(min64(kStrip, ceil_div(tiles, kRowMultiple) * kRowMultiple)),
        v_plane(spread_stride<T>(strip * v_ld)),
        m_plane(spread_stride<T>(strip * m_ld)),
        x_in_place(in_place<S, T>(p.x, p.c_in)),
        y_in_place(in_place<S, T>(p.y, p.c_out) &&
                   (p.skip.data == nullptr || in_place<S, T>(p.skip, p.c_out))) {}

  void run(ParallelFor parallel) {
    Scratch shared(Scratch::bytes_for<T>(kFrequencies * u_plane) + Scratch::bytes_for<T>(m_ld));
    T* u = shared.take<T>(kFrequencies * u_plane);
    T* bias = shared.take<T>(m_ld);
    load_vector<S>(p.bias, p.c_out, bias);
    parallel_for(parallel, p.c_in, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k)
        transform_weight<S>(p.weight, p.c_in, p.c_out, k, u, u_plane);
    });
    parallel_for(parallel, ceil_div(tiles, strip), [&](int64_t begin, int64_t end) {
      const int64_t x_stage = 4 * (2 * strip + 2) * v_ld, y_stage = 4 * strip * m_ld;
      Scratch scratch(Scratch::bytes_for<T>(kFrequencies * v_plane) +
                      Scratch::bytes_for<T>(kFrequencies * m_plane) +
                      Scratch::bytes_for<T>(x_stage) + 2 * Scratch::bytes_for<T>(y_stage));
      T* v = scratch.take<T>(kFrequencies * v_plane);
      T* m = scratch.take<T>(kFrequencies * m_plane);
      T* x = scratch.take<T>(x_stage);
      T* y = scratch.take<T>(y_stage);
      T* skip = scratch.take<T>(y_stage);
      for (int64_t index = begin; index < end; ++index) {
        const int64_t first = index * strip, count = min64(strip, tiles - first);
        for_each_run(first, count,
                     [&](const TileRun& run, int64_t t) { load_run(run, v + t * v_ld, x); });
        multiply(ceil_div(count, kRowMultiple) * kRowMultiple, v, u, m);
        for_each_run(first, count, [&](const TileRun& run, int64_t t) {
          store_run(run, m + t * m_ld, bias, y, skip);
        });
      }
    });
  }

 private:
  const Conv3x3Params& p;
  const int64_t tiles_h, tiles_w, tiles;
  const int64_t v_ld, m_ld, u_plane;  // elements of a pixel's channels, of a frequency's matrix
  const int64_t strip, v_plane, m_plane;
  const bool x_in_place, y_in_place;

  // Calls visit(run, t) for the runs of `count` tiles from `first`, the t-th first of which it is.
  template <typename Visit>
  SR_INLINE void for_each_run(int64_t first, int64_t count, const Visit& visit) const {
    for (int64_t t = 0; t < count;) {
      const int64_t tile = first + t, row = tile / tiles_w, w = tile % tiles_w;
      const TileRun run{row / tiles_h, row % tiles_h, w, min64(count - t, tiles_w - w)};
      visit(run, t);
      t += run.count;
    }
  }

  // v <- transformed inputs of the run's tiles.
  void load_run(const TileRun& run, T* v, T* staged) const {
    const int64_t h = 2 * run.h - 1;
    int64_t t = 0;
    while (t < run.count) {
      int64_t end = t;  // of tiles that need the border's zeros, or are not usable in place
      const bool rows_inside = x_in_place && h >= 0 && h + 4 <= p.height;
      while (end < run.count &&
             !(rows_inside && run.w + end > 0 && 2 * (run.w + end) + 3 <= p.width))
        ++end;
      if (end > t) {
        const int64_t columns = 2 * (end - t) + 2;
        stage<S>(p.x, p.c_in, p.height, p.width, run.n, h, 4, 2 * (run.w + t) - 1, columns, staged,
                 v_ld);
        Patch<T> patch{{}, v_ld};
        for (int i = 0; i < 4; ++i) patch.row[i] = staged + i * columns * v_ld;
        for (; t < end; ++t) {
          transform_input(patch, v_ld, v + t * v_ld, v_plane);
          for (int i = 0; i < 4; ++i) patch.row[i] += 2 * v_ld;
        }
        continue;
      }
      if constexpr (std::is_same_v<S, T>) {
        Patch<T> patch{{}, p.x.stride_w};
        for (int i = 0; i < 4; ++i) patch.row[i] = at<T>(p.x, run.n, 0, h + i, 2 * (run.w + t) - 1);
        for (; t < run.count && 2 * (run.w + t) + 3 <= p.width; ++t) {
          transform_input(patch, p.c_in, v + t * v_ld, v_plane);
          for (int i = 0; i < 4; ++i) patch.row[i] += 2 * p.x.stride_w;
        }
      }
    }
  }

  // m[f] <- v[f] u[f] for every frequency f.
  void multiply(int64_t rows, const T* v, const T* u, T* m) const {
    const ColumnGroups<T> groups(p.c_out);
    for (int64_t f = 0; f < kFrequencies; ++f)
      for (int64_t group = 0; group < groups.count; ++group) {
        const int64_t begin = groups.begin(group);
        frequency_columns<T, kMaxVectors>(groups.width(group) / Simd<T>::width, rows, p.c_in,
                                          v + f * v_plane, v_ld, u + f * u_plane + begin * p.c_in,
                                          m + f * m_plane + begin, m_ld);
      }
  }

  // y <- act(transformed m + bias + skip) of the run's tiles.
  void store_run(const TileRun& run, const T* m, const T* bias, T* y, T* skip) const {
    const Activation activation = p.activation;
    const T slope = T(p.negative_slope);
    const int64_t h = 2 * run.h, w = 2 * run.w, columns = 2 * run.count;
    Outputs<T> out{};
    if constexpr (std::is_same_v<S, T>) {
      if (y_in_place) {
        out.y = at<T>(p.y, run.n, 0, h, w);
        out.y_row = p.y.stride_h, out.y_pixel = p.y.stride_w;
        if (p.skip.data != nullptr) out.skip = at<T>(p.skip, run.n, 0, h, w);
        out.skip_row = p.skip.stride_h, out.skip_pixel = p.skip.stride_w;
        out.rows = static_cast<int>(min64(2, p.height - h));
        for (int64_t t = 0; t < run.count; ++t) {
          out.columns = static_cast<int>(min64(2, p.width - w - 2 * t));
          transform_output(m + t * m_ld, m_plane, bias, activation, slope, p.c_out, out);
          out.y += 2 * out.y_pixel;
          if (out.skip != nullptr) out.skip += 2 * out.skip_pixel;
        }
        return;
      }
    }
    out.y = y;
    if (p.skip.data != nullptr) {
      stage<S>(p.skip, p.c_out, p.height, p.width, run.n, h, 2, w, columns, skip, m_ld);
      out.skip = skip;
    }
    out.y_row = out.skip_row = columns * m_ld;
    out.y_pixel = out.skip_pixel = m_ld;
    out.rows = out.columns = 2;
    for (int64_t t = 0; t < run.count; ++t) {
      transform_output(m + t * m_ld, m_plane, bias, activation, slope, m_ld, out);
      out.y += 2 * m_ld;
      if (out.skip != nullptr) out.skip += 2 * m_ld;
    }
    unstage<S>(y, m_ld, p.y, p.c_out, p.height, p.width, run.n, h, 2, w, columns);
  }
};

}  // namespace

void conv3x3(const Conv3x3Params& params, ParallelFor parallel) {
  dispatch_scalar(params.kind,
                  [&](auto element) { Convolution<decltype(element)>(params).run(parallel); });
}

}  // namespace SR_KERNELS_ISA
}  // namespace sr_kernels
