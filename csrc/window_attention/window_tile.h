// One window of a feature map as a tile of its own, and the softmax of its scores: what all kernels
// of attention inside windows are made of. Include only from a kernel's cpu.cpp; internal linkage,
// as simd.h.
#pragma once

#include "common/simd.h"
#include "common/window_geometry.h"

namespace sr_kernels {
namespace SR_KERNELS_ISA {
namespace {

// ------------------------------------------------------------------ gather and scatter

// The part of each of a window's rows that lies without a break in the image. A row that the roll
// wraps around has two.
struct RowSegment {
  int64_t w, count;  // first column in the image, pixels
  int64_t column;    // first column in the window
};

struct WindowPosition {
  int64_t n, a, b;
  RowSegment segment[2];
  int segment_count;

  WindowPosition(const WindowGeometry& geometry, int64_t index)
      : WindowPosition(geometry, index / (geometry.windows_w() * geometry.windows_h()),
                       index / geometry.windows_w() % geometry.windows_h(),
                       index % geometry.windows_w()) {}
  WindowPosition(const WindowGeometry& geometry, int64_t n_, int64_t a_, int64_t b_)
      : n(n_), a(a_), b(b_) {
    const int64_t w = geometry.source_column(b, 0);
    const int64_t first = min64(geometry.window_w, geometry.width - w);
    segment[0] = {w, first, 0};
    segment[1] = {0, geometry.window_w - first, first};
    segment_count = first < geometry.window_w ? 2 : 1;
  }
};

SR_INLINE bool is_channels_last(const FeatureMap& map) {
  return map.stride_c == 1 && map.stride_w != 1;
}

// Calls run(pixel, token, count) for every run of count pixels of the window that lie in one image
// row; pixel is the offset of the first from the map's (n, c) plane, token its number.
template <typename Run>
SR_INLINE void for_each_run(const WindowGeometry& geometry, const WindowPosition& window,
                            const FeatureMap& map, const Run& run) {
  for (int r = 0; r < geometry.window_h; ++r) {
    const int64_t row = geometry.source_row(window.a, r) * map.stride_h;
    for (int s = 0; s < window.segment_count; ++s) {
      const RowSegment& segment = window.segment[s];
      run(row + segment.w * map.stride_w, r * int64_t{geometry.window_w} + segment.column,
          segment.count);
    }
  }
}

// The tokens of a window of a channels_last map, in order: calls square(pixels, token) for every W
// of them, with a pointer to each one's channels, and then pixel(pointer, token) for each of the
// rest.
template <int W, typename S, typename Square, typename Pixel>
SR_INLINE void for_each_square_of_tokens(const WindowGeometry& geometry,
                                         const WindowPosition& window, const FeatureMap& map,
                                         S* plane, const Square& square, const Pixel& pixel) {
  S* pixels[W];
  int count = 0;
  int64_t first = 0;
  for_each_run(geometry, window, map, [&](int64_t offset, int64_t token, int64_t run) {
    for (int64_t i = 0; i < run; ++i) {
      pixels[count++] = plane + offset + i * map.stride_w;
      if (count < W) continue;
      square(pixels, first);
      first = token + i + 1;
      count = 0;
    }
  });
  for (int i = 0; i < count; ++i) pixel(pixels[i], first + i);
}
// Calls visit(c) for squares of W channels that cover all; the last overlaps the one before.
template <int W, typename Visit>
SR_INLINE void for_each_square_of_channels(int64_t channels, const Visit& visit) {
  for (int64_t c = 0; c < channels; c += W) visit(min64(c, channels - W));
}
// Calls copy(count as a constant) for the usual widths of a window, copy(count) for others.
template <int N>
struct Constant {
  SR_INLINE operator int64_t() const { return N; }
};
template <typename Copy>
SR_INLINE void with_count(int64_t count, const Copy& copy) {
  switch (count) {
    case 4:
      return copy(Constant<4>{});
    case 8:
      return copy(Constant<8>{});
    case 16:
      return copy(Constant<16>{});
    default:
      return copy(count);
  }
}

// destination[c * channel_stride + i * token_stride] = map[n, c0 + c, pixel of token i]. One of the
// two strides is 1.
template <typename S, typename T>
void gather(const FeatureMap& map, int64_t c0, int64_t channels, const WindowGeometry& geometry,
            const WindowPosition& window, T* destination, int64_t channel_stride,
            int64_t token_stride) {
  S* plane = at<S>(map, window.n, c0, 0, 0);
  if (is_channels_last(map)) {
    const auto one = [&](const S* source, int64_t token) {
      T* target = destination + token * token_stride;
      if (channel_stride == 1)
        for (int64_t c = 0; c < channels; ++c) target[c] = to_compute(source[c]);
      else
        for (int64_t c = 0; c < channels; ++c) target[c * channel_stride] = to_compute(source[c]);
    };
    const auto all = [&] {
      for_each_run(geometry, window, map, [&](int64_t pixel, int64_t token, int64_t count) {
        for (int64_t i = 0; i < count; ++i) one(plane + pixel + i * map.stride_w, token + i);
      });
    };
    if (token_stride != 1) return all();
    const auto squares = [&](auto width) {
      constexpr int W = decltype(width)::value;
      for_each_square_of_tokens<W>(
          geometry, window, map, plane,
          [&](S* const* pixels, int64_t token) {
            for_each_square_of_channels<W>(channels, [&](int64_t c) {
              decltype(load_lanes<W>(plane)) square[W];
#pragma GCC unroll 16
              for (int k = 0; k < W; ++k) square[k] = load_lanes<W>(pixels[k] + c);
              transpose(square);
#pragma GCC unroll 16
              for (int k = 0; k < W; ++k)
                store_lanes<W>(destination + (c + k) * channel_stride + token, square[k]);
            });
          },
          one);
    };
    return with_squares<T>(channels, squares, all);
  }
  const bool dense_rows = map.stride_w == 1;
  for_each_run(geometry, window, map, [&](int64_t pixel, int64_t token, int64_t count) {
    with_count(count, [&](auto run) {
      for (int64_t c = 0; c < channels; ++c) {
        const S* source = plane + c * map.stride_c + pixel;
        T* target = destination + c * channel_stride + token * token_stride;
        if (std::is_same_v<S, T> && dense_rows && token_stride == 1)
          std::memcpy(static_cast<void*>(target), source, sizeof(T) * static_cast<size_t>(run));
        else if (dense_rows && token_stride == 1)
          for (int64_t i = 0; i < run; ++i) target[i] = to_compute(source[i]);
        else
          for (int64_t i = 0; i < run; ++i)
            target[i * token_stride] = to_compute(source[i * map.stride_w]);
      }
    });
  });
}

// Asks for rows [r0, r1) of a window that is gathered next: its runs are too short for the hardware
// to foresee. Always inline: g++ 12 takes a function that only prefetches for one without effects.
template <typename S>
SR_INLINE void prefetch_rows(const FeatureMap& map, int64_t c0, int64_t channels,
                             const WindowGeometry& geometry, const WindowPosition& window, int r0,
                             int r1) {
  const S* plane = at<S>(map, window.n, c0, 0, 0);
  const bool channels_last = is_channels_last(map);
  for (int r = r0; r < r1; ++r) {
    const int64_t row = geometry.source_row(window.a, r) * map.stride_h;
    for (int s = 0; s < window.segment_count; ++s) {
      const RowSegment& segment = window.segment[s];
      const S* run = plane + row + segment.w * map.stride_w;
      if (channels_last) {
        for (int64_t i = 0; i < segment.count; ++i) {
          __builtin_prefetch(run + i * map.stride_w, 0, 2);
          __builtin_prefetch(run + i * map.stride_w + channels - 1, 0, 2);
        }
      } else {
        for (int64_t c = 0; c < channels; ++c) __builtin_prefetch(run + c * map.stride_c, 0, 2);
      }
    }
  }
}

// The way back: every pixel of the window, from source[c * channel_stride + i].
template <typename S, typename T>
void scatter(const T* source, int64_t channel_stride, const FeatureMap& map, int64_t c0,
             int64_t channels, const WindowGeometry& geometry, const WindowPosition& window) {
  S* plane = at<S>(map, window.n, c0, 0, 0);
  if (is_channels_last(map)) {
    const auto one = [&](S* target, int64_t token) {
      for (int64_t c = 0; c < channels; ++c)
        from_compute(source[c * channel_stride + token], target + c);
    };
    const auto squares = [&](auto width) {
      constexpr int W = decltype(width)::value;
      for_each_square_of_tokens<W>(
          geometry, window, map, plane,
          [&](S* const* pixels, int64_t token) {
            for_each_square_of_channels<W>(channels, [&](int64_t c) {
              decltype(load_lanes<W>(source)) square[W];
#pragma GCC unroll 16
              for (int k = 0; k < W; ++k)
                square[k] = load_lanes<W>(source + (c + k) * channel_stride + token);
              transpose(square);
#pragma GCC unroll 16
              for (int k = 0; k < W; ++k) store_lanes<W>(pixels[k] + c, square[k]);
            });
          },
          one);
    };
    return with_squares<T>(channels, squares, [&] {
      for_each_run(geometry, window, map, [&](int64_t pixel, int64_t token, int64_t count) {
        for (int64_t i = 0; i < count; ++i) one(plane + pixel + i * map.stride_w, token + i);
      });
    });
  }
  for_each_run(geometry, window, map, [&](int64_t pixel, int64_t token, int64_t count) {
    with_count(count, [&](auto run) {
      for (int64_t c = 0; c < channels; ++c) {
        const T* values = source + c * channel_stride + token;
        S* target = plane + c * map.stride_c + pixel;
        if (std::is_same_v<S, T> && map.stride_w == 1)
          std::memcpy(static_cast<void*>(target), values, sizeof(T) * static_cast<size_t>(run));
        else if (map.stride_w == 1)
          for (int64_t i = 0; i < run; ++i) from_compute(values[i], target + i);
        else
          for (int64_t i = 0; i < run; ++i) from_compute(values[i], target + i * map.stride_w);
      }
    });
  });
}

// Windows beside each other, gathered and scattered together: a cache line, of which a small window
// takes a part, is then fetched once for all of them. Where the channels of a map lie a power of
// two apart, few of their lines stay in a cache, and none until the next window.
struct WindowRun {
  WindowPosition first;
  int64_t count;

  // Windows from index on, before end: at most `most` of one row, none of them wrapped around, or
  // one.
  WindowRun(const WindowGeometry& geometry, int64_t index, int64_t end, int64_t most)
      : first(geometry, index), count(1) {
    if (first.segment_count > 1) return;
    const int64_t fit = (geometry.width - first.segment[0].w) / geometry.window_w;
    count = min64(min64(most, fit), min64(end - index, geometry.windows_w() - first.b));
  }
  // A line's worth of them. Windows of 4 that a shift lays across lines: four lines' worth, since
  // the two at the ends of a run are shared with the next; wider ones have no more room in the
  // cache.
  template <typename S>
  static int64_t most(const WindowGeometry& geometry) {
    const int64_t bytes = geometry.shift_w != 0 && geometry.window_w <= 4 ? 256 : 64;
    return max64(1, min64(16, bytes / static_cast<int64_t>(sizeof(S)) / geometry.window_w));
  }
  WindowPosition position(const WindowGeometry& geometry, int64_t i) const {
    return WindowPosition(geometry, first.n, first.a, first.b + i);
  }
};

// As gather() and scatter() of one window with consecutive tokens; window i of the run lies at
// i * window_stride.
template <typename S, typename T>
void gather(const FeatureMap& map, int64_t c0, int64_t channels, const WindowGeometry& geometry,
            const WindowRun& windows, T* destination, int64_t channel_stride,
            int64_t window_stride) {
  if (windows.count == 1 || map.stride_w != 1) {
    for (int64_t i = 0; i < windows.count; ++i)
      gather<S>(map, c0, channels, geometry, windows.position(geometry, i),
                destination + i * window_stride, channel_stride, 1);
    return;
  }
  const S* plane = at<S>(map, windows.first.n, c0, 0, windows.first.segment[0].w);
  with_count(geometry.window_w, [&](auto run) {
    for (int64_t c = 0; c < channels; ++c)
      for (int r = 0; r < geometry.window_h; ++r) {
        const S* source =
            plane + c * map.stride_c + geometry.source_row(windows.first.a, r) * map.stride_h;
        T* target = destination + c * channel_stride + r * int64_t{run};
        for (int64_t i = 0; i < windows.count; ++i, source += run, target += window_stride) {
          if constexpr (std::is_same_v<S, T>)
            std::memcpy(target, source, sizeof(T) * static_cast<size_t>(run));
          else
            for (int64_t k = 0; k < run; ++k) target[k] = to_compute(source[k]);
        }
      }
  });
}
template <typename S, typename T>
void scatter(const T* source, int64_t channel_stride, int64_t window_stride, const FeatureMap& map,
             int64_t c0, int64_t channels, const WindowGeometry& geometry,
             const WindowRun& windows) {
  if (windows.count == 1 || map.stride_w != 1) {
    for (int64_t i = 0; i < windows.count; ++i)
      scatter<S>(source + i * window_stride, channel_stride, map, c0, channels, geometry,
                 windows.position(geometry, i));
    return;
  }
  S* plane = at<S>(map, windows.first.n, c0, 0, windows.first.segment[0].w);
  with_count(geometry.window_w, [&](auto run) {
    for (int64_t c = 0; c < channels; ++c)
      for (int r = 0; r < geometry.window_h; ++r) {
        S* target =
            plane + c * map.stride_c + geometry.source_row(windows.first.a, r) * map.stride_h;
        const T* values = source + c * channel_stride + r * int64_t{run};
        for (int64_t i = 0; i < windows.count; ++i, target += run, values += window_stride) {
          if constexpr (std::is_same_v<S, T>)
            std::memcpy(target, values, sizeof(T) * static_cast<size_t>(run));
          else
            for (int64_t k = 0; k < run; ++k) from_compute(values[k], target + k);
        }
      }
  });
}

// destination[j * destination_ld + i] = source[i * source_ld + j]
template <typename T>
void transpose(const T* source, int64_t source_ld, int64_t rows, int64_t columns, T* destination,
               int64_t destination_ld) {
  transpose_block(source, source_ld, rows, columns, destination, destination_ld, true);
}

// ------------------------------------------------------------------ relative position bias

// The bias of one head as rows over queries. For the key (jh, jw) the bias of query (ih, iw) is
// table[ih - jh + wh - 1][iw - jw + ww - 1]. Band jw holds the table's columns
// [ww - 1 - jw, 2 ww - 1 - jw) as a dense (2 wh - 1) x ww block; the bias of key (jh, jw) to all
// queries is then the run of wh * ww elements from the band's row wh - 1 - jh on.
struct BiasBands {
  int64_t window_h, window_w;
  explicit BiasBands(const WindowGeometry& geometry)
      : window_h(geometry.window_h), window_w(geometry.window_w) {}
  int64_t band() const { return (2 * window_h - 1) * window_w; }
  int64_t size() const { return window_w * band(); }
  int64_t row(int64_t key) const {
    return key % window_w * band() + (window_h - 1 - key / window_w) * window_w;
  }
  // Calls visit(position in the bands, row of the table) for every element.
  template <typename Visit>
  void for_each(const Visit& visit) const {
    int64_t position = 0;
    for (int64_t jw = 0; jw < window_w; ++jw)
      for (int64_t dh = 0; dh < 2 * window_h - 1; ++dh)
        for (int64_t iw = 0; iw < window_w; ++iw)
          visit(position++, dh * (2 * window_w - 1) + iw - jw + window_w - 1);
  }
};

// ------------------------------------------------------------------ softmax of score columns

// exp(x) for x <= 0 or NaN: what is left of exp() of simd.h when x cannot overflow.
SR_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  const ReducedExp e = reduced_exp(x);
  return x < broadcast(-87.33654f) ? Vec<float>{} : e.mantissa * power_of_two(e.exponent);
}
SR_INLINE Vec<double> exp_nonpositive(Vec<double> x) { return exp(x); }

// What turns products q_i . k_j into scores.
template <typename T>
struct ScoreTerms {
  T scale;
  const T* bias;  // the head's bands, or nullptr
  BiasBands bands;
  const T* region;  // region of each token, or nullptr where nothing is masked
  SR_INLINE bool trivial() const { return scale == T(1) && bias == nullptr && region == nullptr; }
};

// V vectors of columns of S, the first of which is query i0: products become exp(score - maximum)
// in place; their maxima and sums go to maximum[] and sum[]. A NaN in a column makes its sum NaN.
template <typename T, int V>
void softmax_columns(const ScoreTerms<T>& terms, int64_t tokens, int64_t i0, T* s, int64_t ld,
                     T* maximum_out, T* sum_out) {
  constexpr int W = Simd<T>::width;
  Vec<T> highest[V], sum[V];
#pragma GCC unroll 4
  for (int x = 0; x < V; ++x) {
    highest[x] = broadcast(T(-__builtin_inf()));
    sum[x] = Vec<T>{};
  }
  if (terms.trivial()) {
    for (int64_t j = 0; j < tokens; ++j)
#pragma GCC unroll 4
      for (int x = 0; x < V; ++x) {
        const Vec<T> value = load(s + j * ld + x * W);
        highest[x] = value > highest[x] ? value : highest[x];
      }
  } else {
    const Vec<T> excluded = broadcast(T(-__builtin_inf()));
    for (int64_t j = 0; j < tokens; ++j) {
      const T* bias = terms.bias == nullptr ? nullptr : terms.bias + terms.bands.row(j) + i0;
#pragma GCC unroll 4
      for (int x = 0; x < V; ++x) {
        T* place = s + j * ld + x * W;
        Vec<T> value = load(place) * terms.scale;
        if (bias != nullptr) value += load(bias + x * W);
        if (terms.region != nullptr)
          value = load(terms.region + i0 + x * W) == broadcast(terms.region[j]) ? value : excluded;
        store<T>(place, value);
        highest[x] = value > highest[x] ? value : highest[x];
      }
    }
  }
  // In runs of 16: one long sequential sum would cost the digits that stock's tree sum keeps.
  for (int64_t j0 = 0; j0 < tokens; j0 += 16) {
    const int64_t j1 = min64(j0 + 16, tokens);
    Vec<T> part[V] = {};
    for (int64_t j = j0; j < j1; ++j)
#pragma GCC unroll 4
      for (int x = 0; x < V; ++x) {
        T* place = s + j * ld + x * W;
        const Vec<T> e = exp_nonpositive(load(place) - highest[x]);
        part[x] += e;
        store<T>(place, e);
      }
#pragma GCC unroll 4
    for (int x = 0; x < V; ++x) sum[x] += part[x];
  }
#pragma GCC unroll 4
  for (int x = 0; x < V; ++x) {
    store<T>(maximum_out + x * W, highest[x]);
    store<T>(sum_out + x * W, sum[x]);
  }
}

// The block of queries [i0, i0 + columns): s = softmax numerators, keys as rows.
template <typename T>
void score_block(const ScoreTerms<T>& terms, const T* q, const T* k, int64_t d, int64_t tokens,
                 int64_t stride, int64_t i0, int64_t columns, T* s, int64_t ld, T* maximum_out,
                 T* sum_out) {
  constexpr int W = Simd<T>::width;
  product<T>(Start::kZero, tokens, d, columns, rows_of_k(k, stride), StridedRows<T>{q + i0, stride},
             nullptr, s, ld);
  int64_t i = 0;
  for (; i + 4 * W <= columns; i += 4 * W)
    softmax_columns<T, 4>(terms, tokens, i0 + i, s + i, ld, maximum_out + i, sum_out + i);
  for (; i < columns; i += W)
    softmax_columns<T, 1>(terms, tokens, i0 + i, s + i, ld, maximum_out + i, sum_out + i);
}

// C[m, p] = sum_k A[m, k] B[k, p] with k in runs of 64, each summed by itself: the digits that one
// sum over 256 tokens would lose. part: room for m_count rows of ldc.
template <typename T>
void product_in_runs(int64_t m_count, int64_t k_count, int64_t p_count, const T* a, int64_t lda,
                     const T* b, int64_t ldb, T* c, int64_t ldc, T* part) {
  constexpr int64_t kRun = 64;
  product<T>(Start::kZero, m_count, min64(kRun, k_count), p_count, rows_of_k(a, lda),
             StridedRows<T>{b, ldb}, nullptr, c, ldc);
  for (int64_t k = kRun; k < k_count; k += kRun) {
    product<T>(Start::kZero, m_count, min64(kRun, k_count - k), p_count,
               rows_of_k(a + k * lda, lda), StridedRows<T>{b + k * ldb, ldb}, nullptr, part, ldc);
    for (int64_t m = 0; m < m_count; ++m)
      for (int64_t p = 0; p < p_count; p += Simd<T>::width)
        store<T>(c + m * ldc + p, load(c + m * ldc + p) + load(part + m * ldc + p));
  }
}

}  // namespace
}  // namespace SR_KERNELS_ISA
}  // namespace sr_kernels
