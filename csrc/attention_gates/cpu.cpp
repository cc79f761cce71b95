// Attention gates on the CPU.
//
//   pixel_attention          y = x * sigmoid(W x + b)
//   spatial_attention        y = u * sigmoid(conv([max_c u, mean_c u]) + b),  u = x
//   pixel_spatial_attention  the same with u = pixel_attention(x)
//   channel_attention        y = x * sigmoid(W_up relu(W_down z + b_down) + b_up),
//                            z = mean_hw x (+ std_hw x)
//   gated_conv1x1            y = W (gate * x) + b (+ residual)
//
// Every pass over a feature map is pointwise in the pixels, so a tile is one long run of pixels,
// all channels, whatever the image's shape. What couples pixels happens between the passes, on
// small maps: the spatial gate's convolution on (N, 2, H, W), the channel gate's two products on
// (N, C). Products of a tile go strip by strip: a strip's sums are in the first-level cache when
// exponential, residual and the store to y take them. The next tile of x and the lines that y is
// written to are fetched during the pixel gate's product, evenly: beside the exponentials alone
// memory would not keep pace. Exponentials between the product's own register tiles were slower:
// what they store to y, whose rows lie far apart, drives x out of the first-level cache.
// Where a pixel's channels lie side by side (channels_last) the products of forward and the spatial
// gate's statistics run along them instead, a block of pixels at a time, and transpose nothing.
// The spatial gates' forward goes band by band down the image, eight rows at a time: x comes from
// memory once, in long runs, and is in a cache still when its gate is known. Backward recomputes
// what forward did not keep, which is everything but the inputs.
//
// Floor, float32, bytes per pixel (x, y and their gradients once each, per pass that must come
// after the one before it): pixel_attention and spatial_attention 8 C, channel_attention 12 C,
// pixel_spatial_attention 16 C, gated_conv1x1 4 (c_in + c_out). The products add 2 C^2 FLOP, which
// bound pixel_attention from C = 52 on, and its gate C exponentials. Products and exponentials use
// the same units, so that their times add: of pixel_attention's, one thread, C = 60, AVX2 (AMD Zen
// 3), the product takes 70 % of the time, at a large product's rate. Fractions of the floor: the
// README's table.
//
// Sums over pixels are taken in runs of fixed length and the runs are added in order: no result
// depends on the number of threads.
#include "attention_gates/params.h"

#include "common/exp2.h"
#include "common/pixel_product.h"
#include "common/tiling.h"

namespace sr_kernels {
namespace SR_KERNELS_ISA {
namespace {

template <typename T>
SR_INLINE void zero_tail(T* rows, int64_t channels, int64_t row_stride, int64_t columns) {
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = columns; i < row_stride; ++i) rows[c * row_stride + i] = T(0);
}

// The sum of the lanes in float64.
SR_INLINE double wide_sum(Vec<double> v) { return sum_by_halves<double>(v); }
SR_INLINE double wide_sum(Vec<float> v) {
  typedef float HalfVec __attribute__((vector_size(kVectorBytes / 2)));
  HalfVec halves[2];
  std::memcpy(halves, &v, sizeof(v));
  return wide_sum(__builtin_convertvector(halves[0], Vec<double>) +
                  __builtin_convertvector(halves[1], Vec<double>));
}

template <typename S>
LeftOperand<typename Compute<S>::type> pack_weight(const void* weight, int64_t rows,
                                                   int64_t columns, bool transposed,
                                                   typename Compute<S>::type* destination) {
  const S* source = static_cast<const S*>(weight);
  return transposed ? pack(source, 1, columns, columns, rows, destination)
                    : pack(source, columns, 1, rows, columns, destination);
}

// Pixels whose product with a weight stays in the first-level cache until it is used.
constexpr int64_t kStrip = 64;
// Vectors of exponentials step by step; all are in registers.
constexpr int kAtOnce = 4;

// The rows of a one-row tile where they lie in the map, if vectors can be read and written there.
template <typename S>
StridedRows<typename Compute<S>::type> rows_in_place(const FeatureMap& map, const Tile& t) {
  if constexpr (std::is_same_v<S, typename Compute<S>::type>) {
    if (map.data != nullptr && map.stride_w == 1)
      return {at<S>(map, t.n, 0, t.h, t.w), map.stride_c};
  }
  return {nullptr, 0};
}
template <typename T>
SR_INLINE void prefetch(const T* row, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T)))
    __builtin_prefetch(row + i, 0, 2);
}

// ------------------------------------------------------------------ statistics over channels

// One instruction, where maximum() is four. If one of the two is a NaN it is b.
template <typename V>
SR_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}

// mean_row <- its sums, divided.
template <typename T>
void divide_by_channels(int64_t channels, int64_t columns, T* mean_row) {
  sweep<T>(columns, [&](int64_t i, auto tag) {
    using V = decltype(tag);
    put(mean_row + i, get<V>(mean_row + i) / T(channels));
  });
}

// maximum and mean over the channels of `rows` runs of pixels, x_stride apart in x and map_stride
// in the maps. A NaN may be missing from the maximum, never from the mean beside it.
template <typename T>
void channel_statistics(StridedRows<T> x, int64_t x_stride, int64_t channels, int64_t rows,
                        int64_t columns, T* max_map, T* mean_map, int64_t map_stride) {
  constexpr int64_t kAtOnce = 8;
  int64_t c = 0;
  for (; c + kAtOnce <= channels; c += kAtOnce)
    for (int64_t r = 0; r < rows; ++r) {
      const T *x0 = x[c] + r * x_stride, *x4 = x[c + 4] + r * x_stride;
      T *max_row = max_map + r * map_stride, *mean_row = mean_map + r * map_stride;
      sweep<T>(columns, [&](int64_t i, auto tag) {
        using V = decltype(tag);
        V largest = get<V>(c == 0 ? x0 + i : max_row + i);
        V sum = c == 0 ? V{} : get<V>(mean_row + i);
#pragma GCC unroll 2
        for (const T* row : {x0 + i, x4 + i}) {
          const V v0 = get<V>(row), v1 = get<V>(row + x.ld);
          const V v2 = get<V>(row + 2 * x.ld), v3 = get<V>(row + 3 * x.ld);
          largest = larger(largest, larger(larger(v0, v1), larger(v2, v3)));
          sum += (v0 + v1) + (v2 + v3);
        }
        put(max_row + i, largest);
        put(mean_row + i, sum);
      });
    }
  for (; c < channels; ++c)
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = x[c] + r * x_stride;
      T *max_row = max_map + r * map_stride, *mean_row = mean_map + r * map_stride;
      sweep<T>(columns, [&](int64_t i, auto tag) {
        using V = decltype(tag);
        const V v = get<V>(row + i);
        put(max_row + i, c == 0 ? v : larger(get<V>(max_row + i), v));
        put(mean_row + i, c == 0 ? v : get<V>(mean_row + i) + v);
      });
    }
  for (int64_t r = 0; r < rows; ++r)
    divide_by_channels(channels, columns, mean_map + r * map_stride);
}

// The same where the channels of a pixel lie side by side, a vector of them at least: a vector of
// pixels has its partial results transposed, instead of its channels.
template <typename T>
void channel_statistics_by_pixel(const T* x, int64_t pixel_stride, int64_t channels,
                                 int64_t columns, T* max_row, T* mean_row) {
  constexpr int W = Simd<T>::width;
  decltype(Vec<T>{} < Vec<T>{}) unseen;  // the lanes of the last vector that none before it had
  for (int k = 0; k < W; ++k) unseen[k] = k >= W - channels % W ? -1 : 0;
  for (int64_t i = 0; i < columns; i += W) {
    Vec<T> largest[W], sums[W];
    for (int k = 0; k < W; ++k) {
      const T* pixel = x + min64(i + k, columns - 1) * pixel_stride;
      Vec<T> top = load(pixel), sum = top;
      int64_t c = W;
      for (; c + W <= channels; c += W) {
        const Vec<T> v = load(pixel + c);
        top = larger(top, v);
        sum += v;
      }
      if (c < channels) {
        const Vec<T> v = load(pixel + channels - W);
        top = larger(top, v);
        sum += unseen ? v : Vec<T>{};
      }
      largest[k] = top;
      sums[k] = sum;
    }
    transpose(largest);
    transpose(sums);
    for (int step = W / 2; step > 0; step /= 2)
      for (int k = 0; k < step; ++k) {
        largest[k] = larger(largest[k], largest[k + step]);
        sums[k] += sums[k + step];
      }
    const size_t bytes = static_cast<size_t>(min64(W, columns - i)) * sizeof(T);
    std::memcpy(max_row + i, largest, bytes);
    std::memcpy(mean_row + i, sums, bytes);
  }
  divide_by_channels(channels, columns, mean_row);
}

// ------------------------------------------------------------------ products pixel by pixel

// Where the channels of a pixel lie side by side, a vector of them at least, as compute elements:
// vectors can then run over channels, and no tile needs to be transposed.
template <typename S>
bool channels_fill_vectors(const FeatureMap& map, int64_t channels) {
  using T = typename Compute<S>::type;
  return std::is_same_v<S, T> && map.stride_c == 1 && channels >= Simd<T>::width;
}

// ------------------------------------------------------------------ pixel gate

// Rows in scratch are whole vectors long: row_stride is a multiple of the vector width.
template <typename T>
struct PixelGate {
  int64_t channels;
  const T* weight;                   // of tiled_product()
  LeftOperand<T> weight_transposed;  // for backward() alone
  const T* bias;

  // out (channels x out_stride) <- W x + b, `columns` pixels. ahead, target: rows of as many pixels
  // that are read or written next, or none. They are fetched register tile by register tile, since
  // memory would not keep pace with the exponentials. Not inlined: g++ would keep one of the
  // accumulators in memory.
  __attribute__((noinline)) void argument(const T* x, int64_t row_stride, int64_t columns, T* out,
                                          int64_t out_stride, StridedRows<T> ahead,
                                          StridedRows<T> target) const {
    constexpr int64_t kTileColumns = kTileVectors * Simd<T>::width;
    tiled_product<T>(
        channels, channels, 0, columns, weight, StridedRows<T>{x, row_stride},
        [&](int64_t m, int64_t p, int i, int j) {
          if (j == 0 && ahead.data != nullptr) prefetch(ahead[m + i] + p, kTileColumns);
          if (j == 0 && target.data != nullptr) prefetch(target[m + i] + p, kTileColumns);
          return bias == nullptr ? Vec<T>{} : broadcast(bias[m + i]);
        },
        [&](int64_t m, int64_t p, int i, int j, Vec<T> v) {
          store<T>(out + (m + i) * out_stride + p + j, v);
        });
  }
  // For backward: gate <- sigmoid(W x + b). Not inlined: passes that compare a recomputed maximum
  // with its channels rely on equal bits wherever this runs.
  __attribute__((noinline)) void evaluate(const T* x, int64_t row_stride, T* gate) const {
    argument(x, row_stride, row_stride, gate, row_stride, {}, {});
    for (int64_t i = 0; i < channels * row_stride; i += Simd<T>::width)
      store<T>(gate + i, sigmoid(load(gate + i)));
  }
  __attribute__((noinline)) void apply(const T* x, const T* gate, int64_t row_stride, T* y) const {
    for (int64_t i = 0; i < channels * row_stride; i += Simd<T>::width)
      store<T>(y + i, load(x + i) * load(gate + i));
  }
  // gradient: of y = x * gate on entry, of the gate's argument W x + b on return. dx <- the
  // gradient of x, both paths.
  void backward(const T* x, const T* gate, int64_t columns, int64_t row_stride, T* gradient, T* dx,
                bool want_dx) const {
    for (int64_t i = 0; i < channels * row_stride; i += Simd<T>::width) {
      const Vec<T> g = load(gradient + i), s = load(gate + i);
      store<T>(dx + i, g * s);
      store<T>(gradient + i, g * load(x + i) * (1 - s) * s);
    }
    zero_tail(gradient, channels, row_stride, columns);  // a NaN weight would have left NaN there
    if (want_dx)
      product<T>(Start::kAccumulate, channels, channels, row_stride, weight_transposed,
                 StridedRows<T>{gradient, row_stride}, nullptr, dx, row_stride);
  }
};

// y <- x * sigmoid(W x + b), run of pixels by run of pixels.
template <typename S>
class GatedRuns {
 public:
  using T = typename Compute<S>::type;

  // weight (C, C) and bias (C), or nullptr, as the caller has them. image: as x and y see it.
  GatedRuns(const FeatureMap& x, const FeatureMap& y, const PixelRows& image, int64_t channels,
            const void* weight, const void* bias)
      : x_(x),
        y_(y),
        image_(image),
        channels_(channels),
        by_pixel_(channels_fill_vectors<S>(x, channels) && channels_fill_vectors<S>(y, channels)),
        shared_(Scratch::bytes_for<T>(weight_size(channels)) + Scratch::bytes_for<T>(channels)) {
    T* packed = shared_.take<T>(weight_size(channels));
    const S* source = static_cast<const S*>(weight);
    gate_.channels = channels;
    gate_.weight = by_pixel_ ? pack_panels(source, 1, channels, channels, channels, packed)
                             : pack_tiles(source, channels, 1, channels, channels, packed);
    gate_.bias = load_vector<S>(bias, channels, shared_.take<T>(channels));
  }
  // Pixels of a run: whole strips, where the image has them.
  int64_t run_pixels() const { return run_length<T>(channels_) / kStrip * kStrip; }
  Tiling tiling(int64_t batch, int64_t rows, int64_t columns) const {
    return Tiling(batch, rows, columns, 1, run_pixels(), kStrip);
  }

  // What a thread needs.
  class Worker {
   public:
    explicit Worker(const GatedRuns& runs)
        : runs_(runs),
          stride_(spread_stride<T>(runs.run_pixels())),
          scratch_(Scratch::bytes_for<T>(runs.channels_ * stride_) +
                   Scratch::bytes_for<T>(runs.channels_ * kStrip)),
          x_(scratch_.take<T>(runs.channels_ * stride_)),
          z_(scratch_.take<T>(runs.channels_ * kStrip)) {}

    // Gates run t. next: the run to fetch meanwhile. max_row, mean_row: of y over its channels,
    // unless nullptr (both).
    void gate(const Tile& t, const Tile& next, T* max_row, T* mean_row) const {
      if constexpr (std::is_same_v<S, T>) {
        if (runs_.by_pixel_) return gate_by_pixel(t, max_row, mean_row);
      }
      const FeatureMap &x = runs_.x_, &y = runs_.y_;
      const int64_t channels = runs_.channels_;
      const int64_t height = runs_.image_.height, width = runs_.image_.width;
      StridedRows<T> ahead = rows_in_place<S>(x, next), rows = rows_in_place<S>(y, t);
      if (next.columns < t.columns) ahead.data = nullptr;
      load_tile<S>(x, t.n, 0, channels, t.h, 1, t.w, t.columns, height, width, x_, stride_,
                   stride_);
      const bool direct = rows.data != nullptr;
      if (!direct) rows = {x_, stride_};
      for (int64_t p = 0; p < t.columns; p += kStrip) {
        const int64_t columns = min64(kStrip, t.columns - p);
        runs_.gate_.argument(x_ + p, stride_, padded<T>(columns), z_, kStrip,
                             ahead.from_column(ahead.data != nullptr ? p : 0),
                             direct ? rows.from_column(p + 2 * kStrip) : StridedRows<T>{});
        for (int64_t c = 0; c < channels; ++c)
          gate_row(x_ + c * stride_ + p, z_ + c * kStrip, const_cast<T*>(rows[c]) + p, columns,
                   max_row != nullptr);
        if (max_row != nullptr)
          channel_statistics(StridedRows<T>{z_, kStrip}, 0, channels, 1, columns, max_row + p,
                             mean_row + p, 0);
      }
      if (!direct)
        store_tile<S>(x_, stride_, stride_, y, t.n, 0, channels, t.h, 1, t.w, t.columns, height,
                      width);
    }

   private:
    // y <- x * sigmoid(z) for `columns` pixels of a channel; y may be x. z <- the same, if `keep`.
    SR_INLINE static void gate_row(const T* x, T* z, T* y, int64_t columns, bool keep) {
      constexpr int W = Simd<T>::width;
      int64_t i = 0;
      for (; i + kAtOnce * W <= columns; i += kAtOnce * W) {
        Vec<T> factor[kAtOnce], u[kAtOnce];
#pragma GCC unroll 8
        for (int k = 0; k < kAtOnce; ++k) {
          factor[k] = load(x + i + k * W);
          u[k] = load(z + i + k * W);
        }
        times_sigmoids(factor, u);
#pragma GCC unroll 8
        for (int k = 0; k < kAtOnce; ++k) {
          store<T>(y + i + k * W, u[k]);
          if (keep) store<T>(z + i + k * W, u[k]);
        }
      }
      for (; i < columns; i += W) {
        const Vec<T> u = times_sigmoid(load(x + i), load(z + i));
        std::memcpy(y + i, &u, static_cast<size_t>(min64(W, columns - i)) * sizeof(T));
        if (keep) store<T>(z + i, u);
      }
    }

    void gate_by_pixel(const Tile& t, T* max_row, T* mean_row) const {
      constexpr int64_t kPixels = 32;  // whose x, y and the weight stay in the first-level cache
      const int64_t channels = runs_.channels_;
      const int64_t x_pixel = runs_.x_.stride_w, y_pixel = runs_.y_.stride_w;
      const T* bias = runs_.gate_.bias;
      for (int64_t i = 0; i < t.columns; i += kPixels) {
        const int64_t count = min64(kPixels, t.columns - i);
        const T* x = at<const T>(runs_.x_, t.n, 0, t.h, t.w + i);
        T* y = at<T>(runs_.y_, t.n, 0, t.h, t.w + i);
        pixel_product<T>(
            count, channels, channels, x, x_pixel, runs_.gate_.weight,
            [&](int64_t column) { return bias == nullptr ? Vec<T>{} : load(bias + column); },
            [&](int64_t m, int64_t column, Vec<T> z) {
              store<T>(y + m * y_pixel + column, times_sigmoid(load(x + m * x_pixel + column), z));
            });
        if (max_row != nullptr)
          channel_statistics_by_pixel(y, y_pixel, channels, count, max_row + i, mean_row + i);
      }
    }

    const GatedRuns& runs_;
    int64_t stride_;
    Scratch scratch_;
    T *x_, *z_;  // a run; W x + b of a strip
  };

 private:
  static int64_t weight_size(int64_t channels) {
    return max64(packed_size(channels, channels), Panels<T>(channels).computed() * channels);
  }
  const FeatureMap &x_, &y_;
  const PixelRows& image_;
  int64_t channels_;
  bool by_pixel_;
  Scratch shared_;
  PixelGate<T> gate_{};
};

template <typename S>
void pixel_forward(const PixelAttentionParams& params, ParallelFor parallel) {
  PixelAttentionParams p = params;
  const PixelRows image(p.height, p.width, {&p.x, &p.y});
  const GatedRuns<S> runs(p.x, p.y, image, p.channels, p.weight, p.bias);
  const Tiling tiling = runs.tiling(p.batch, image.height, image.width);
  parallel_for(parallel, tiling.count(), [&](int64_t begin, int64_t end) {
    const typename GatedRuns<S>::Worker worker(runs);
    for (int64_t index = begin; index < end; ++index)
      worker.gate(tiling[index], tiling[min64(index + 1, end - 1)], nullptr, nullptr);
  });
}

template <typename S>
void pixel_backward(const PixelAttentionBackwardParams& params, ParallelFor parallel) {
  using T = typename Compute<S>::type;
  PixelAttentionBackwardParams b = params;
  const PixelAttentionParams& p = b.forward;
  const PixelRows image(p.height, p.width, {&b.forward.x, &b.grad, &b.dx});
  const Tiling tiling(p.batch, image.height, image.width, 1, run_length<T>(p.channels));
  const int64_t stride = spread_stride<T>(tiling.columns), size = p.channels * stride;
  const int64_t weight_size = p.channels * p.channels, packed = packed_size(p.channels, p.channels);
  const Chunks chunks(tiling.count());
  const int64_t chunk_size = weight_size + p.channels;  // dW, then db
  const bool want_dx = b.dx.data != nullptr;

  Scratch shared(2 * Scratch::bytes_for<T>(packed) + Scratch::bytes_for<T>(p.channels) +
                 Scratch::bytes_for<T>(chunks.count * chunk_size));
  PixelGate<T> pixel{};
  pixel.channels = p.channels;
  pixel.weight = pack_tiles(static_cast<const S*>(p.weight), p.channels, 1, p.channels, p.channels,
                            shared.take<T>(packed));
  pixel.weight_transposed =
      pack_weight<S>(p.weight, p.channels, p.channels, true, shared.take<T>(packed));
  pixel.bias = load_vector<S>(p.bias, p.channels, shared.take<T>(p.channels));
  T* partial = shared.take<T>(chunks.count * chunk_size);

  parallel_for(parallel, chunks.count, [&](int64_t begin, int64_t end) {
    Scratch scratch(4 * Scratch::bytes_for<T>(size));
    T* x = scratch.take<T>(size);
    T* gate = scratch.take<T>(size);
    T* gradient = scratch.take<T>(size);
    T* dx = scratch.take<T>(size);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      T* dw_sum = partial + chunk * chunk_size;
      for (int64_t index = chunks.begin(chunk); index < chunks.end(chunk); ++index) {
        const Tile t = tiling[index];
        load_tile<S>(p.x, t.n, 0, p.channels, t.h, 1, t.w, t.columns, image.height, image.width, x,
                     stride, stride);
        load_tile<S>(b.grad, t.n, 0, p.channels, t.h, 1, t.w, t.columns, image.height, image.width,
                     gradient, stride, stride);
        pixel.evaluate(x, stride, gate);
        pixel.backward(x, gate, t.columns, stride, gradient, dx, want_dx);
        if (want_dx)
          store_tile<S>(dx, stride, stride, b.dx, t.n, 0, p.channels, t.h, 1, t.w, t.columns,
                        image.height, image.width);
        if (b.dweight != nullptr)
          accumulate_inner_products(p.channels, p.channels, stride,
                                    StridedRows<T>{gradient, stride}, StridedRows<T>{x, stride},
                                    dw_sum, p.channels);
        if (b.dbias != nullptr)
          accumulate_row_sums(p.channels, stride, StridedRows<T>{gradient, stride},
                              dw_sum + weight_size);
      }
    }
  });
  if (b.dweight != nullptr)
    reduce_chunks(partial, chunks.count, chunk_size, weight_size, static_cast<S*>(b.dweight));
  if (b.dbias != nullptr)
    reduce_chunks(partial + weight_size, chunks.count, chunk_size, p.channels,
                  static_cast<S*>(b.dbias));
}

// ------------------------------------------------------------------ spatial gate

// Planes of the workspace. The backward ones overwrite what is no longer read.
enum : int64_t {
  kMaximum = 0,
  kMean = 1,
  kGate = 2,                 // sigmoid(conv + b)
  kGateGradient = 3,         // sum_c grad * u, then the gradient of conv + b
  kTies = 4,                 // how many channels share the maximum
  kMeanGradient = kMean,     // divided by C
  kMaximumGradient = kTies,  // divided by the number of ties
};

template <typename T>
struct Planes {
  T* data;
  int64_t count, height, width;
  T* row(int64_t n, int64_t plane, int64_t pixel) const {
    return data + (n * count + plane) * height * width + pixel;
  }
  FeatureMap map() const { return {data, count * height * width, height * width, width, 1}; }
};

// sum_c grad u, and in how many channels u is the maximum, of one run of pixels. Channels are added
// in fours first, which halves the rounding of a plain sum.
template <typename T>
void gate_gradient_and_ties(StridedRows<T> u, StridedRows<T> grad, int64_t channels,
                            int64_t columns, const T* max_row, T* gate_gradient, T* ties) {
  for (int64_t c = 0; c < channels; c += 4) {
    const int64_t count = min64(4, channels - c);
    sweep<T>(columns, [&](int64_t i, auto tag) {
      using V = decltype(tag);
      const V zero = V{}, one = zero + T(1), largest = get<V>(max_row + i);
      V product[4] = {zero, zero, zero, zero}, equal = zero;
      for (int64_t k = 0; k < count; ++k) {
        const V v = get<V>(u[c + k] + i);
        product[k] = get<V>(grad[c + k] + i) * v;
        equal += v == largest ? one : zero;
      }
      const V sum = (product[0] + product[1]) + (product[2] + product[3]);
      put(gate_gradient + i, c == 0 ? sum : get<V>(gate_gradient + i) + sum);
      put(ties + i, c == 0 ? equal : get<V>(ties + i) + equal);
    });
  }
}

// out[i] = start + sum over planes and taps of weight[plane][ky][kx] * source[plane][ky][i + kx]
// for one row of whole vectors.
template <typename T, int V>
SR_INLINE void convolve_vectors(const T* source, int64_t plane_stride, int64_t row_stride,
                                int64_t planes, const T* weight, int64_t kernel, T start, T* out) {
  constexpr int W = Simd<T>::width;
  Vec<T> sum[V];
  for (int j = 0; j < V; ++j) sum[j] = broadcast(start);
  for (int64_t plane = 0; plane < planes; ++plane)
    for (int64_t ky = 0; ky < kernel; ++ky) {
      const T* row = source + plane * plane_stride + ky * row_stride;
      Vec<T> row_sum[V] = {};  // a sum of sums: a large kernel's taps in one would round too often
      for (int64_t kx = 0; kx < kernel; ++kx) {
        const Vec<T> w = broadcast(weight[(plane * kernel + ky) * kernel + kx]);
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) row_sum[j] += w * load(row + kx + j * W);
      }
      for (int j = 0; j < V; ++j) sum[j] += row_sum[j];
    }
  for (int j = 0; j < V; ++j) store(out + j * W, sum[j]);
}

template <typename T>
void convolve_row(const T* source, int64_t plane_stride, int64_t row_stride, int64_t planes,
                  const T* weight, int64_t kernel, T start, T* out, int64_t columns) {
  constexpr int W = Simd<T>::width;
  int64_t i = 0;
  for (; i + 3 * W < columns; i += 4 * W)
    convolve_vectors<T, 4>(source + i, plane_stride, row_stride, planes, weight, kernel, start,
                           out + i);
  for (; i < columns; i += W)
    convolve_vectors<T, 1>(source + i, plane_stride, row_stride, planes, weight, kernel, start,
                           out + i);
}

constexpr int64_t kMapRows = 16, kMapColumns = 128;

// gate <- sigmoid(conv([maximum, mean]) + b), plane to plane.
template <typename T>
void evaluate_spatial_gate(const Planes<T>& planes, int64_t batch, const T* weight, T bias,
                           int64_t kernel, ParallelFor parallel) {
  const Tiling tiling(batch, planes.height, planes.width, kMapRows, kMapColumns);
  const int64_t reach = kernel / 2, columns = padded<T>(tiling.columns);
  const int64_t stride = padded<T>(columns + 2 * reach);
  const int64_t plane_stride = (tiling.rows + 2 * reach) * stride;
  parallel_for(parallel, tiling.count(), [&](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::bytes_for<T>(2 * plane_stride) + Scratch::bytes_for<T>(columns));
    T* statistics = scratch.take<T>(2 * plane_stride);
    T* gate = scratch.take<T>(columns);
    for (int64_t index = begin; index < end; ++index) {
      const Tile t = tiling[index];
      load_tile<T>(planes.map(), t.n, kMaximum, 2, t.h - reach, t.rows + 2 * reach, t.w - reach,
                   t.columns + 2 * reach, planes.height, planes.width, statistics, plane_stride,
                   stride);
      for (int64_t r = 0; r < t.rows; ++r) {
        convolve_row(statistics + r * stride, plane_stride, stride, 2, weight, kernel, bias, gate,
                     t.columns);
        for (int64_t i = 0; i < t.columns; i += Simd<T>::width)
          store<T>(gate + i, sigmoid(load(gate + i)));
        std::memcpy(planes.row(t.n, kGate, (t.h + r) * planes.width + t.w), gate,
                    static_cast<size_t>(t.columns) * sizeof(T));
      }
    }
  });
}

// What both directions need to know about the two weights.
template <typename S>
struct SpatialWeights {
  using T = typename Compute<S>::type;
  PixelGate<T> pixel{};
  const T* weight;  // (2, kernel, kernel)
  T bias;

  static int64_t bytes(const SpatialAttentionParams& p) {
    return 2 * Scratch::bytes_for<T>(packed_size(p.channels, p.channels)) +
           Scratch::bytes_for<T>(p.channels) + Scratch::bytes_for<T>(2 * p.kernel * p.kernel);
  }
  SpatialWeights(const SpatialAttentionParams& p, Scratch& scratch) {
    const int64_t taps = 2 * p.kernel * p.kernel, packed = packed_size(p.channels, p.channels);
    weight = load_vector<S>(p.weight, taps, scratch.take<T>(taps));
    bias = p.bias != nullptr ? to_compute(*static_cast<const S*>(p.bias)) : T(0);
    pixel.channels = p.channels;
    if (p.pixel_weight == nullptr) return;
    pixel.weight = pack_tiles(static_cast<const S*>(p.pixel_weight), p.channels, 1, p.channels,
                              p.channels, scratch.take<T>(packed));
    pixel.weight_transposed =
        pack_weight<S>(p.pixel_weight, p.channels, p.channels, true, scratch.take<T>(packed));
    pixel.bias = load_vector<S>(p.pixel_bias, p.channels, scratch.take<T>(p.channels));
  }
};

// gate <- sigmoid(conv([maximum, mean]) + b) of one row. statistics: the first row that it sees.
template <typename T, typename Weights>
void evaluate_gate_row(const T* statistics, int64_t plane_stride, int64_t stride,
                       const Weights& weights, int64_t kernel, T* gate, int64_t columns) {
  convolve_row(statistics, plane_stride, stride, 2, weights.weight, kernel, weights.bias, gate,
               columns);
  for (int64_t i = 0; i < columns; i += Simd<T>::width) store<T>(gate + i, sigmoid(load(gate + i)));
}

// y = x * gate for a rectangle of pixels, one gate value a pixel, gate_stride a row; x may be y.
template <typename S>
void multiply_rows(const FeatureMap& x, const FeatureMap& y, const Tile& t, int64_t channels,
                   const typename Compute<S>::type* gates, int64_t gate_stride) {
  using T = typename Compute<S>::type;
  if (x.stride_c == 1 && y.stride_c == 1 && channels > 1) {
    for (int64_t r = 0; r < t.rows; ++r)
      for (int64_t i = 0; i < t.columns; ++i) {
        const S* source = at<S>(x, t.n, 0, t.h + r, t.w + i);
        S* target = at<S>(y, t.n, 0, t.h + r, t.w + i);
        const T g = gates[r * gate_stride + i];
        if constexpr (std::is_same_v<S, T>) {
          constexpr int W = Simd<T>::width;
          if (channels >= W) {  // the last vector overlaps, and is read before what it overlaps is
            const Vec<T> last = load(source + channels - W) * g;  // written, lest x is y
            for (int64_t c = 0; c + W <= channels; c += W)
              store<T>(target + c, load(source + c) * g);
            store<T>(target + channels - W, last);
            continue;
          }
        }
        for (int64_t c = 0; c < channels; ++c) from_compute(to_compute(source[c]) * g, target + c);
      }
    return;
  }
  for (int64_t index = 0; index < channels * t.rows; ++index) {
    const int64_t c = index / t.rows, r = index % t.rows;
    const S* source = at<S>(x, t.n, c, t.h + r, t.w);
    S* target = at<S>(y, t.n, c, t.h + r, t.w);
    const T* gate = gates + r * gate_stride;
    if constexpr (std::is_same_v<S, T>) {
      if (x.stride_w == 1 && y.stride_w == 1) {
        sweep<T>(t.columns, [&](int64_t i, auto tag) {
          using V = decltype(tag);
          put(target + i, get<V>(source + i) * get<V>(gate + i));
        });
        continue;
      }
    }
    if (x.stride_w == 1 && y.stride_w == 1)
      for (int64_t i = 0; i < t.columns; ++i)
        from_compute(to_compute(source[i]) * gate[i], target + i);
    else
      for (int64_t i = 0; i < t.columns; ++i)
        from_compute(to_compute(source[i * x.stride_w]) * gate[i], target + i * y.stride_w);
  }
}

// Rows of a band, over which a spatial gate's passes run together.
inline int64_t band_rows(int64_t height, int64_t reach) {
  return ceil_div(height, ceil_div(height, max64(48, 16 * reach)));
}

// Rows that a pass takes at a time: short runs of so many channels are read and written at half of
// the speed of long ones.
constexpr int64_t kRowsAtATime = 8;

// u = x * sigmoid(W_p x + b_p) passes through y, since the convolution needs its neighbours. A
// band's passes run down its rows together: u is multiplied where a cache still holds it. Rows
// whose neighbours lie in other bands come last.
template <typename S>
void pixel_spatial_forward(const SpatialAttentionParams& params, ParallelFor parallel) {
  using T = typename Compute<S>::type;
  SpatialAttentionParams p = params;
  const Planes<T> planes{static_cast<T*>(p.workspace), p.kForwardPlanes, p.height, p.width};
  const PixelRows image(p.height, p.width, {&p.x, &p.y});
  const GatedRuns<S> runs(p.x, p.y, image, p.channels, p.pixel_weight, p.pixel_bias);
  p.pixel_weight = nullptr;  // from here on it is the spatial gate alone
  Scratch shared(SpatialWeights<S>::bytes(p));
  const SpatialWeights<S> weights(p, shared);

  const int64_t reach = p.kernel / 2, columns = padded<T>(p.width);
  const int64_t stride = padded<T>(columns + 2 * reach);
  const int64_t plane_stride = (kRowsAtATime + 2 * reach) * stride;
  const int64_t gate_bytes =
      Scratch::bytes_for<T>(2 * plane_stride) + Scratch::bytes_for<T>(kRowsAtATime * columns);
  // y <- u * gate in `count` rows of image n from h on. statistics, gate: of gate_bytes.
  const auto finish_rows = [&](int64_t n, int64_t h, int64_t count, T* statistics, T* gate) {
    load_tile<T>(planes.map(), n, kMaximum, 2, h - reach, count + 2 * reach, -reach,
                 p.width + 2 * reach, p.height, p.width, statistics, plane_stride, stride);
    for (int64_t k = 0; k < count; ++k)
      evaluate_gate_row(statistics + k * stride, plane_stride, stride, weights, p.kernel,
                        gate + k * columns, p.width);
    multiply_rows<S>(params.y, params.y, {n, h, 0, count, p.width}, p.channels, gate, columns);
  };

  const Tiling bands(p.batch, p.height, 1, band_rows(p.height, reach), 1);
  parallel_for(parallel, bands.count(), [&](int64_t begin, int64_t end) {
    const typename GatedRuns<S>::Worker worker(runs);
    Scratch scratch(gate_bytes);
    T* statistics = scratch.take<T>(2 * plane_stride);
    T* gate = scratch.take<T>(kRowsAtATime * columns);
    for (int64_t index = begin; index < end; ++index) {
      const Tile band = bands[index];
      const int64_t band_end = band.h + band.rows;
      // The band as image sees it: some of its rows, or a piece of its only one.
      const bool flat = image.height != p.height;
      const Tiling tiling =
          runs.tiling(1, flat ? 1 : band.rows, flat ? band.rows * p.width : p.width);
      const auto run = [&](int64_t i) {
        Tile t = tiling[i];
        t.n = band.n;
        (flat ? t.w : t.h) += flat ? band.h * p.width : band.h;
        return t;
      };
      int64_t ready = band.h == 0 ? 0 : band.h + reach;  // the next row to finish
      const int64_t last = band_end == p.height ? p.height : band_end - reach;
      for (int64_t i = 0; i < tiling.count(); ++i) {
        const Tile t = run(i);
        const int64_t first = t.h * image.width + t.w;
        T *max_row = planes.row(t.n, kMaximum, first), *mean_row = planes.row(t.n, kMean, first);
        worker.gate(t, run(min64(i + 1, tiling.count() - 1)), max_row, mean_row);
        const int64_t rows_known = (first + t.columns) / p.width;
        const int64_t limit = min64(last, rows_known == p.height ? p.height : rows_known - reach);
        while (ready + kRowsAtATime <= limit || (ready < limit && limit == last)) {
          const int64_t count = min64(kRowsAtATime, limit - ready);
          finish_rows(band.n, ready, count, statistics, gate);
          ready += count;
        }
      }
    }
  });

  // The rows on both sides of where two bands meet.
  const int64_t seams = bands.tiles_h - 1;
  parallel_for(parallel, p.batch * seams * 2 * reach, [&](int64_t begin, int64_t end) {
    Scratch scratch(gate_bytes);
    T* statistics = scratch.take<T>(2 * plane_stride);
    T* gate = scratch.take<T>(kRowsAtATime * columns);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t seam = index / (2 * reach);
      const int64_t h = (seam % seams + 1) * bands.rows - reach + index % (2 * reach);
      if (h < p.height) finish_rows(seam / seams, h, 1, statistics, gate);
    }
  });
}

// A tile's statistics, convolution and product run down its rows together: x comes from memory once
// and is multiplied where a cache still holds it. Statistics around a tile are taken by its
// neighbours too.
template <typename S>
void spatial_forward(const SpatialAttentionParams& p, ParallelFor parallel) {
  using T = typename Compute<S>::type;
  if (p.pixel_weight != nullptr) return pixel_spatial_forward<S>(p, parallel);
  const int64_t reach = p.kernel / 2;
  const int64_t held = (int64_t{4} << 20) / static_cast<int64_t>(sizeof(T));  // rows of x in cache
  const Tiling tiling(
      p.batch, p.height, p.width, band_rows(p.height, reach),
      max64(max64(320, 16 * reach), held / ((kRowsAtATime + 2 * reach) * p.channels)));
  const int64_t columns = padded<T>(tiling.columns), stride = padded<T>(columns + 2 * reach);
  const int64_t plane_stride = (tiling.rows + 2 * reach) * stride;
  const int64_t x_stride = spread_stride<T>(tiling.columns + 2 * reach);
  const bool by_pixel = channels_fill_vectors<S>(p.x, p.channels);
  const bool in_place = !by_pixel && rows_in_place<S>(p.x, {0, 0, 0, 1, 1}).data != nullptr;
  Scratch shared(SpatialWeights<S>::bytes(p));
  const SpatialWeights<S> weights(p, shared);

  parallel_for(parallel, tiling.count(), [&](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::bytes_for<T>(2 * plane_stride) +
                    Scratch::bytes_for<T>(kRowsAtATime * columns) +
                    Scratch::bytes_for<T>(p.channels * x_stride));
    T* statistics = scratch.take<T>(2 * plane_stride);  // maximum, mean
    T* gate = scratch.take<T>(kRowsAtATime * columns);
    T* x = scratch.take<T>(p.channels * x_stride);
    for (int64_t index = begin; index < end; ++index) {
      const Tile t = tiling[index];
      const int64_t w0 = max64(0, t.w - reach), w1 = min64(p.width, t.w + t.columns + reach);
      const int64_t top = t.h - reach, rows = t.rows + 2 * reach;  // of the statistics
      std::memset(statistics, 0, static_cast<size_t>(2 * plane_stride) * sizeof(T));
      for (int64_t r = 0; r < rows; r += kRowsAtATime) {
        const int64_t h0 = max64(0, top + r),
                      h1 = min64(p.height, top + min64(r + kRowsAtATime, rows));
        for (int64_t h = h0; h < h1; h += in_place ? h1 - h0 : 1) {
          T* max_map = statistics + (h - top) * stride + w0 - (t.w - reach);
          T* mean_map = max_map + plane_stride;
          const Tile seen{t.n, h, w0, 1, w1 - w0};
          if (by_pixel)
            channel_statistics_by_pixel(at<const T>(p.x, t.n, 0, h, w0), p.x.stride_w, p.channels,
                                        seen.columns, max_map, mean_map);
          else
            channel_statistics(view_run<S>(p.x, seen, p.channels, p.height, p.width, x, x_stride),
                               p.x.stride_h, p.channels, in_place ? h1 - h0 : 1, seen.columns,
                               max_map, mean_map, stride);
        }
        const int64_t first = max64(0, r - 2 * reach);
        const int64_t count = min64(r + kRowsAtATime, rows) - 2 * reach - first;
        for (int64_t k = 0; k < count; ++k)
          evaluate_gate_row(statistics + (first + k) * stride, plane_stride, stride, weights,
                            p.kernel, gate + k * columns, t.columns);
        multiply_rows<S>(p.x, p.y, {t.n, t.h + first, t.w, count, t.columns}, p.channels, gate,
                         columns);
      }
    }
  });
}

// With s the gate, a = conv + b its argument, m and e the maximum and mean planes:
//   da = (sum_c grad u) s (1 - s)      dm, de = conv^T(da)      db = sum da
//   dw[plane, k] = sum_p da[p] plane[p + k]
//   du = grad s + de / C + [u = m] dm / (number of ties)
// and, where there is a pixel gate, from du as in pixel_attention.
template <typename S>
void spatial_backward(const SpatialAttentionBackwardParams& params, ParallelFor parallel) {
  using T = typename Compute<S>::type;
  SpatialAttentionBackwardParams b = params;
  const SpatialAttentionParams& p = b.forward;
  const Planes<T> planes{static_cast<T*>(p.workspace), p.kBackwardPlanes, p.height, p.width};
  const PixelRows image(p.height, p.width, {&b.forward.x, &b.grad, &b.dx});
  const Tiling tiling(p.batch, image.height, image.width, 1, run_length<T>(p.channels));
  const int64_t stride = spread_stride<T>(tiling.columns), size = p.channels * stride;
  const bool pixel = p.pixel_weight != nullptr;
  const bool want_dx = b.dx.data != nullptr;
  const bool want_du = want_dx || b.dpixel_weight != nullptr || b.dpixel_bias != nullptr;
  Scratch shared(SpatialWeights<S>::bytes(p));
  const SpatialWeights<S> weights(p, shared);

  const auto load_run = [&](const FeatureMap& map, const Tile& t, T* destination) {
    load_tile<S>(map, t.n, 0, p.channels, t.h, 1, t.w, t.columns, image.height, image.width,
                 destination, stride, stride);
  };

  // Statistics, ties and sum_c grad u.
  parallel_for(parallel, tiling.count(), [&](int64_t begin, int64_t end) {
    Scratch scratch(3 * Scratch::bytes_for<T>(size));
    T* x = scratch.take<T>(size);
    T* u = scratch.take<T>(size);
    T* gradient = scratch.take<T>(size);
    for (int64_t index = begin; index < end; ++index) {
      const Tile t = tiling[index];
      const int64_t first = t.h * image.width + t.w;
      StridedRows<T> rows{u, stride};
      if (pixel) {
        load_run(p.x, t, x);
        weights.pixel.evaluate(x, stride, u);
        weights.pixel.apply(x, u, stride, u);
      } else {
        rows = view_run<S>(p.x, t, p.channels, image.height, image.width, x, stride);
      }
      const StridedRows<T> grad =
          view_run<S>(b.grad, t, p.channels, image.height, image.width, gradient, stride);
      T* max_row = planes.row(t.n, kMaximum, first);
      T* gate_gradient = planes.row(t.n, kGateGradient, first);
      T* ties = planes.row(t.n, kTies, first);
      channel_statistics(rows, 0, p.channels, 1, t.columns, max_row, planes.row(t.n, kMean, first),
                         0);
      gate_gradient_and_ties(rows, grad, p.channels, t.columns, max_row, gate_gradient, ties);
    }
  });
  evaluate_spatial_gate(planes, p.batch, weights.weight, weights.bias, p.kernel, parallel);

  // da, and with it the gradients of the convolution's weight and bias.
  const Tiling map_tiling(p.batch, p.height, p.width, kMapRows, kMapColumns);
  const int64_t reach = p.kernel / 2, taps = p.kernel * p.kernel;
  const int64_t map_columns = padded<T>(map_tiling.columns);
  const int64_t map_stride = padded<T>(map_columns + 2 * reach);
  const int64_t plane_stride = (map_tiling.rows + 2 * reach) * map_stride;
  const bool want_dw = b.dweight != nullptr;
  {
    const Chunks chunks(map_tiling.count());
    const int64_t chunk_size = 2 * taps + 1;
    Scratch sums(Scratch::bytes_for<double>(chunks.count * chunk_size));
    double* partial = sums.take<double>(chunks.count * chunk_size);
    parallel_for(parallel, chunks.count, [&](int64_t begin, int64_t end) {
      Scratch scratch(Scratch::bytes_for<T>(2 * plane_stride) +
                      Scratch::bytes_for<T>(map_tiling.rows * map_columns));
      T* statistics = scratch.take<T>(2 * plane_stride);
      T* da = scratch.take<T>(map_tiling.rows * map_columns);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        double* dw_sum = partial + chunk * chunk_size;
        for (int64_t index = chunks.begin(chunk); index < chunks.end(chunk); ++index) {
          const Tile t = map_tiling[index];
          for (int64_t r = 0; r < t.rows; ++r) {
            const int64_t pixel_index = (t.h + r) * p.width + t.w;
            T* gate_gradient = planes.row(t.n, kGateGradient, pixel_index);
            const T* gate = planes.row(t.n, kGate, pixel_index);
            T* da_row = da + r * map_columns;
            for (int64_t i = 0; i < t.columns; ++i) {
              gate_gradient[i] = gate_gradient[i] * (1 - gate[i]) * gate[i];
              da_row[i] = gate_gradient[i];
            }
            for (int64_t i = t.columns; i < map_columns; ++i) da_row[i] = T(0);
            Vec<T> sum{};
            for (int64_t i = 0; i < map_columns; i += Simd<T>::width) sum += load(da_row + i);
            dw_sum[2 * taps] += wide_sum(sum);
          }
          if (!want_dw) continue;
          load_tile<T>(planes.map(), t.n, kMaximum, 2, t.h - reach, t.rows + 2 * reach, t.w - reach,
                       t.columns + 2 * reach, p.height, p.width, statistics, plane_stride,
                       map_stride);
          for (int64_t tap = 0; tap < 2 * taps; ++tap) {
            const T* source = statistics + tap / taps * plane_stride +
                              tap % taps / p.kernel * map_stride + tap % p.kernel;
            Vec<T> sum{};
            for (int64_t r = 0; r < t.rows; ++r)
              for (int64_t i = 0; i < map_columns; i += Simd<T>::width)
                sum += load(da + r * map_columns + i) * load(source + r * map_stride + i);
            dw_sum[tap] += wide_sum(sum);
          }
        }
      }
    });
    if (want_dw)
      reduce_chunks(partial, chunks.count, chunk_size, 2 * taps, static_cast<S*>(b.dweight));
    if (b.dbias != nullptr)
      reduce_chunks(partial + 2 * taps, chunks.count, chunk_size, 1, static_cast<S*>(b.dbias));
  }
  if (!want_du) return;

  // conv^T(da): the convolution of da with the mirrored weight.
  {
    Scratch mirrored_scratch(Scratch::bytes_for<T>(2 * taps));
    T* mirrored = mirrored_scratch.take<T>(2 * taps);
    for (int64_t tap = 0; tap < taps; ++tap) {
      mirrored[tap] = weights.weight[taps - 1 - tap];
      mirrored[taps + tap] = weights.weight[2 * taps - 1 - tap];
    }
    parallel_for(parallel, map_tiling.count(), [&](int64_t begin, int64_t end) {
      Scratch scratch(Scratch::bytes_for<T>(plane_stride) + Scratch::bytes_for<T>(map_columns));
      T* da = scratch.take<T>(plane_stride);
      T* row = scratch.take<T>(map_columns);
      for (int64_t index = begin; index < end; ++index) {
        const Tile t = map_tiling[index];
        load_tile<T>(planes.map(), t.n, kGateGradient, 1, t.h - reach, t.rows + 2 * reach,
                     t.w - reach, t.columns + 2 * reach, p.height, p.width, da, plane_stride,
                     map_stride);
        for (int64_t r = 0; r < t.rows; ++r) {
          const int64_t pixel_index = (t.h + r) * p.width + t.w;
          T* max_gradient = planes.row(t.n, kMaximumGradient, pixel_index);
          convolve_row(da + r * map_stride, plane_stride, map_stride, 1, mirrored, p.kernel, T(0),
                       row, t.columns);
          for (int64_t i = 0; i < t.columns; ++i) max_gradient[i] = row[i] / max_gradient[i];
          T* mean_gradient = planes.row(t.n, kMeanGradient, pixel_index);
          convolve_row(da + r * map_stride, plane_stride, map_stride, 1, mirrored + taps, p.kernel,
                       T(0), row, t.columns);
          for (int64_t i = 0; i < t.columns; ++i) mean_gradient[i] = row[i] / T(p.channels);
        }
      }
    });
  }

  // du, and from it dx and the pixel gate's gradients.
  const Chunks chunks(tiling.count());
  const int64_t weight_size = pixel ? p.channels * p.channels : 0;
  const int64_t chunk_size = pixel ? weight_size + p.channels : 0;  // dW, then db
  Scratch sums(Scratch::bytes_for<T>(chunks.count * chunk_size));
  T* partial = sums.take<T>(chunks.count * chunk_size);
  parallel_for(parallel, chunks.count, [&](int64_t begin, int64_t end) {
    Scratch scratch(5 * Scratch::bytes_for<T>(size));
    T* x = scratch.take<T>(size);
    T* gate = scratch.take<T>(size);
    T* u = scratch.take<T>(size);
    T* du = scratch.take<T>(size);
    T* dx = scratch.take<T>(size);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      T* dw_sum = partial + chunk * chunk_size;
      for (int64_t index = chunks.begin(chunk); index < chunks.end(chunk); ++index) {
        const Tile t = tiling[index];
        const int64_t first = t.h * image.width + t.w;
        StridedRows<T> rows{u, stride};
        if (pixel) {
          load_run(p.x, t, x);
          weights.pixel.evaluate(x, stride, gate);
          weights.pixel.apply(x, gate, stride, u);
        } else {
          rows = view_run<S>(p.x, t, p.channels, image.height, image.width, x, stride);
        }
        load_run(b.grad, t, du);
        const T* s = planes.row(t.n, kGate, first);
        const T* max_row = planes.row(t.n, kMaximum, first);
        const T* max_gradient = planes.row(t.n, kMaximumGradient, first);
        const T* mean_gradient = planes.row(t.n, kMeanGradient, first);
        for (int64_t c = 0; c < p.channels; ++c) {
          const T* u_row = rows[c];
          T* du_row = du + c * stride;
          sweep<T>(t.columns, [&](int64_t i, auto tag) {
            using V = decltype(tag);
            const V zero = V{}, one = zero + T(1);
            const V equal = get<V>(u_row + i) == get<V>(max_row + i) ? one : zero;
            put(du_row + i, get<V>(du_row + i) * get<V>(s + i) + get<V>(mean_gradient + i) +
                                equal * get<V>(max_gradient + i));
          });
        }
        if (pixel) weights.pixel.backward(x, gate, t.columns, stride, du, dx, want_dx);
        if (want_dx)
          store_tile<S>(pixel ? dx : du, stride, stride, b.dx, t.n, 0, p.channels, t.h, 1, t.w,
                        t.columns, image.height, image.width);
        if (b.dpixel_weight != nullptr)
          accumulate_inner_products(p.channels, p.channels, stride, StridedRows<T>{du, stride},
                                    StridedRows<T>{x, stride}, dw_sum, p.channels);
        if (b.dpixel_bias != nullptr)
          accumulate_row_sums(p.channels, stride, StridedRows<T>{du, stride}, dw_sum + weight_size);
      }
    }
  });
  if (b.dpixel_weight != nullptr)
    reduce_chunks(partial, chunks.count, chunk_size, weight_size, static_cast<S*>(b.dpixel_weight));
  if (b.dpixel_bias != nullptr)
    reduce_chunks(partial + weight_size, chunks.count, chunk_size, p.channels,
                  static_cast<S*>(b.dpixel_bias));
}

// ------------------------------------------------------------------ channel gate

// Sums over one run of pixels of one channel.
struct Moments {
  double count, sum;
  double squares;  // of the deviations from this run's mean
  double dot;      // sum of gradient * x
  bool constant;   // every pixel equals the channel's first
};

// rest <- sum of x - pivot; squares <- sum of (x - pivot)^2 if kSquares; dot <- sum of x * grad if
// kDot. Lanes are summed in T (a run is short), their totals in float64.
struct ShiftedSums {
  double rest, squares, dot;
};
template <bool kSquares, bool kDot, typename T>
ShiftedSums shifted_sums(const T* x, const T* grad, int64_t count, T pivot) {
  constexpr int W = Simd<T>::width;
  const int64_t whole = count / (4 * W) * (4 * W);
  Vec<T> rests[4] = {}, squares[4] = {}, dots[4] = {};  // four: none waits for its last addition
  for (int64_t i = 0; i < whole; i += 4 * W)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vec<T> v = load(x + i + j * W), d = v - pivot;
      rests[j] += d;
      if (kSquares) squares[j] += d * d;
      if (kDot) dots[j] += v * load(grad + i + j * W);
    }
  const auto total = [](const Vec<T>(&v)[4]) { return wide_sum((v[0] + v[1]) + (v[2] + v[3])); };
  ShiftedSums s{total(rests), total(squares), total(dots)};
  for (int64_t i = whole; i < count; ++i) {
    const double v = static_cast<double>(x[i]), d = v - static_cast<double>(pivot);
    s.rest += d;
    if (kSquares) s.squares += d * d;
    if (kDot) s.dot += v * static_cast<double>(grad[i]);
  }
  return s;
}

// A pivot for deviations: 0 for what is not finite, so that sums are what they are without one.
template <typename T>
T finite_pivot(double mean) {
  const T pivot = static_cast<T>(mean);
  return pivot - pivot == 0 ? pivot : T(0);
}
// Four vectors' mean, spread over a run: near enough to the run's own that one pass will do for its
// deviations. Pixels of the run made it, so that even where it is far off, what cancels is less
// than a factor of count / 4 W: five or six bits of float32. Of equal pixels it is their value to
// the last bit: sums of 2^k of them are exact.
template <typename T>
T sampled_pivot(const T* x, int64_t count) {
  constexpr int W = Simd<T>::width;
  if (count < 4 * W) return finite_pivot<T>(static_cast<double>(x[0]));
  double sums[4];
  for (int64_t i = 0; i < 4; ++i) sums[i] = wide_sum(load(x + i * (count - W) / 3));
  return finite_pivot<T>(((sums[0] + sums[1]) + (sums[2] + sums[3])) / (4 * W));
}

// Whether a run's pixels are all the channel's first one: deviations from it are then all 0.
template <typename T>
bool is_constant(double rest, double squares, T pivot, T first) {
  return rest == 0 && squares == 0 && pivot == first;
}

// pivot: near the run's mean, for deviations; equal to the run's pixels where these are all equal.
// Becomes the run's mean, which may serve the channel's next run: however far apart the two runs
// lie, that distance is part of the channel's deviation too, and little cancels.
template <typename T>
Moments run_moments(const T* x, const T* grad, int64_t count, T first, bool contrast, T* pivot) {
  const double n = static_cast<double>(count);
  if (!contrast) {
    const ShiftedSums s = grad == nullptr ? shifted_sums<false, false>(x, grad, count, T(0))
                                          : shifted_sums<false, true>(x, grad, count, T(0));
    return {n, s.rest, 0, s.dot, true};
  }
  const T near = *pivot;
  const ShiftedSums s = grad == nullptr ? shifted_sums<true, false>(x, grad, count, near)
                                        : shifted_sums<true, true>(x, grad, count, near);
  *pivot = finite_pivot<T>(static_cast<double>(near) + s.rest / n);
  return {n, n * static_cast<double>(near) + s.rest, s.squares - s.rest * s.rest / n, s.dot,
          is_constant(s.rest, s.squares, near, first)};
}

// The statistic of one channel of one image.
struct ChannelStatistic {
  double mean, deviation;  // deviation is 0 unless contrast
  double dot;              // sum over the pixels of gradient * x
};

// How a pass over a map can read it where it lies: a plane per channel, or pixels one after the
// other with their channels side by side. Maps that are neither go through a tile in scratch.
enum class Walk { kPlanes, kPixels, kTiles };

template <typename S>
Walk walk_of(std::initializer_list<FeatureMap> maps, int64_t channels) {
  bool planes = true, pixels = channels > 1;
  for (const FeatureMap& map : maps) {
    if (map.data == nullptr) continue;
    planes = planes && map.stride_w == 1;
    pixels = pixels && map.stride_c == 1 && map.stride_w == channels;
  }
  if (!std::is_same_v<S, typename Compute<S>::type>) return Walk::kTiles;
  return planes ? Walk::kPlanes : pixels ? Walk::kPixels : Walk::kTiles;
}

// Pixels whose channels lie side by side are taken a vector's width of pixels at a time: that many
// elements are channels vectors, and a table of one value a channel, repeated, lines up with them.
template <typename T>
int64_t table_size(int64_t channels) {
  return channels * Simd<T>::width;
}
// Fills a table with value(c).
template <typename T, typename Value>
void fill_table(T* table, int64_t channels, const Value& value) {
  for (int64_t c = 0; c < channels; ++c) table[c] = value(c);
  for (int64_t i = channels; i < table_size<T>(channels); ++i) table[i] = table[i - channels];
}
// Calls function(element, table index, V{}) over `elements` elements.
template <typename T, typename Function>
SR_INLINE void sweep_tables(int64_t elements, int64_t size, const Function& function) {
  for (int64_t begin = 0; begin < elements; begin += size)
    sweep<T>(min64(size, elements - begin),
             [&](int64_t i, auto tag) { function(begin + i, i, tag); });
}
// sums (C) <- the sums of a table's entries for each channel.
template <typename T>
void add_up_table(const T* table, int64_t channels, double* sums) {
  for (int64_t c = 0; c < channels; ++c) sums[c] = 0;
  for (int64_t k = 0; k < Simd<T>::width; ++k)
    for (int64_t c = 0; c < channels; ++c) sums[c] += static_cast<double>(table[k * channels + c]);
}

// shifted_sums() for tables: adds to those of rests, squares and dots. A pivot a channel.
template <bool kSquares, bool kDot, typename T>
void add_shifted_pixels(const T* x, const T* grad, int64_t elements, int64_t size, const T* pivots,
                        T* rests, T* squares, T* dots) {
  // Four tables of pixels at a time: sums stay in registers for longer.
  int64_t begin = 0;
  for (; begin + 4 * size <= elements; begin += 4 * size)
    for (int64_t i = 0; i < size; i += Simd<T>::width) {
      const Vec<T> pivot = kSquares ? load(pivots + i) : Vec<T>{};
      Vec<T> d[4], square = load(squares + i), dot = load(dots + i);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Vec<T> v = load(x + begin + j * size + i);
        d[j] = kSquares ? v - pivot : v;
        if (kSquares) square += d[j] * d[j];
        if (kDot) dot += v * load(grad + begin + j * size + i);
      }
      store<T>(rests + i, load(rests + i) + ((d[0] + d[1]) + (d[2] + d[3])));
      if (kSquares) store<T>(squares + i, square);
      if (kDot) store<T>(dots + i, dot);
    }
  sweep_tables<T>(elements - begin, size, [&](int64_t element, int64_t i, auto tag) {
    using V = decltype(tag);
    const V v = get<V>(x + begin + element), d = kSquares ? v - get<V>(pivots + i) : v;
    put(rests + i, get<V>(rests + i) + d);
    if (kSquares) put(squares + i, get<V>(squares + i) + d * d);
    if (kDot) put(dots + i, get<V>(dots + i) + v * get<V>(grad + begin + element));
  });
}

// sampled_pivot() for a table of all channels of `count` pixels. sums: a table to work in.
template <typename T>
void sampled_pivots(const T* x, int64_t count, int64_t channels, T* sums, T* pivots) {
  constexpr int64_t W = Simd<T>::width;
  if (count < 4 * W) {
    fill_table(pivots, channels,
               [&](int64_t c) { return finite_pivot<T>(static_cast<double>(x[c])); });
    return;
  }
  const T *x0 = x, *x1 = x + (count - W) / 3 * channels;
  const T *x2 = x + 2 * (count - W) / 3 * channels, *x3 = x + (count - W) * channels;
  for (int64_t i = 0; i < table_size<T>(channels); i += W)
    store<T>(sums + i, (load(x0 + i) + load(x1 + i)) + (load(x2 + i) + load(x3 + i)));
  for (int64_t half = W / 2 * channels; half >= channels; half /= 2)
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  fill_table(pivots, channels,
             [&](int64_t c) { return finite_pivot<T>(static_cast<double>(sums[c]) / (4 * W)); });
}

// run_moments for all channels of `count` pixels that lie one after the other. first (C): the
// channels' first pixels. tables: kMomentTables of them; totals: 3 C.
constexpr int64_t kMomentTables = 4;
template <typename T>
void pixel_moments(const T* x, const T* grad, int64_t count, int64_t channels, const T* first,
                   bool contrast, T* tables, double* totals, Moments* moments) {
  const int64_t size = table_size<T>(channels), elements = count * channels;
  T *pivots = tables, *rests = pivots + size, *squares = rests + size, *dots = squares + size;
  if (contrast) sampled_pivots(x, count, channels, rests, pivots);
  for (int64_t i = 0; i < 3 * size; ++i) rests[i] = T(0);
  const auto add = contrast ? (grad != nullptr ? add_shifted_pixels<true, true, T>
                                               : add_shifted_pixels<true, false, T>)
                            : (grad != nullptr ? add_shifted_pixels<false, true, T>
                                               : add_shifted_pixels<false, false, T>);
  add(x, grad, elements, size, pivots, rests, squares, dots);
  double *rest = totals, *square = rest + channels, *dot = square + channels;
  add_up_table(rests, channels, rest);
  add_up_table(squares, channels, square);
  add_up_table(dots, channels, dot);
  const double n = static_cast<double>(count);
  for (int64_t c = 0; c < channels; ++c)
    moments[c] = contrast ? Moments{n, n * static_cast<double>(pivots[c]) + rest[c],
                                    square[c] - rest[c] * rest[c] / n, dot[c],
                                    is_constant(rest[c], square[c], pivots[c], first[c])}
                          : Moments{n, rest[c], 0, dot[c], true};
}

// Pixels in a run of channel statistics. Tiles are short; what is read in place need not be, but
// deviations want a pivot from not too far away.
template <typename T>
int64_t statistics_run(Walk walk, int64_t channels, bool contrast) {
  if (walk == Walk::kTiles) return run_length<T>(channels);
  return walk == Walk::kPlanes && !contrast ? 8192 : 2048;
}

// statistics (N, C). With grad.data nullptr dot is 0.
template <typename S>
void channel_statistics_of(const ChannelAttentionParams& p, const FeatureMap& grad,
                           const PixelRows& image, ChannelStatistic* statistics,
                           ParallelFor parallel) {
  using T = typename Compute<S>::type;
  // A PixelRows image of height above 1 is one whose pixels lie at no single distance.
  const Walk walk = walk_of<S>({p.x, grad}, p.channels);
  const Tiling tiling(p.batch, image.height, image.width, 1,
                      statistics_run<T>(walk, p.channels, p.contrast));
  const int64_t stride = spread_stride<T>(tiling.columns);
  const int64_t size = p.channels * stride, table = table_size<T>(p.channels);
  const int64_t runs = tiling.tiles_h * tiling.tiles_w;  // of one image
  Scratch sums(Scratch::bytes_for<Moments>(p.batch * runs * p.channels));
  Moments* moments = sums.take<Moments>(p.batch * runs * p.channels);  // (N, runs, C)
  const auto first_pixel = [&](int64_t n, int64_t c) {
    return to_compute(*at<S>(p.x, n, c, 0, 0));
  };

  if (walk == Walk::kPlanes) {
    parallel_for(parallel, p.batch * p.channels, [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane) {
        const int64_t n = plane / p.channels, c = plane % p.channels;
        T pivot = 0;
        for (int64_t index = n * runs; index < (n + 1) * runs; ++index) {
          const Tile t = tiling[index];
          const void* x_run = at<S>(p.x, n, c, t.h, t.w);
          const void* g_run = grad.data != nullptr ? at<S>(grad, n, c, t.h, t.w) : nullptr;
          const T *x = static_cast<const T*>(x_run), *g = static_cast<const T*>(g_run);
          if (p.contrast && index == n * runs) pivot = sampled_pivot(x, t.columns);
          moments[index * p.channels + c] =
              run_moments(x, g, t.columns, first_pixel(n, c), p.contrast, &pivot);
        }
      }
    });
  } else {
    parallel_for(parallel, tiling.count(), [&](int64_t begin, int64_t end) {
      const bool by_pixel = walk == Walk::kPixels;
      Scratch scratch(by_pixel ? Scratch::bytes_for<T>(kMomentTables * table) +
                                     Scratch::bytes_for<double>(3 * p.channels)
                               : 2 * Scratch::bytes_for<T>(size));
      T* tables = by_pixel ? scratch.take<T>(kMomentTables * table) : nullptr;
      double* totals = by_pixel ? scratch.take<double>(3 * p.channels) : nullptr;
      T* x_tile = by_pixel ? nullptr : scratch.take<T>(size);
      T* grad_tile = by_pixel ? nullptr : scratch.take<T>(size);
      for (int64_t index = begin; index < end; ++index) {
        const Tile t = tiling[index];
        if (by_pixel) {
          const void* x = at<S>(p.x, t.n, 0, t.h, t.w);
          const void* g = grad.data != nullptr ? at<S>(grad, t.n, 0, t.h, t.w) : nullptr;
          const void* first = at<S>(p.x, t.n, 0, 0, 0);
          pixel_moments(static_cast<const T*>(x), static_cast<const T*>(g), t.columns, p.channels,
                        static_cast<const T*>(first), p.contrast, tables, totals,
                        moments + index * p.channels);
          continue;
        }
        const StridedRows<T> x =
            view_run<S>(p.x, t, p.channels, image.height, image.width, x_tile, stride);
        StridedRows<T> g{nullptr, 0};
        if (grad.data != nullptr)
          g = view_run<S>(grad, t, p.channels, image.height, image.width, grad_tile, stride);
        for (int64_t c = 0; c < p.channels; ++c) {
          T pivot = p.contrast ? sampled_pivot(x[c], t.columns) : T(0);
          moments[index * p.channels + c] =
              run_moments(x[c], g.data != nullptr ? g[c] : nullptr, t.columns, first_pixel(t.n, c),
                          p.contrast, &pivot);
        }
      }
    });
  }
  parallel_for(parallel, p.batch * p.channels, [&](int64_t begin, int64_t end) {
    const double pixels = static_cast<double>(image.height) * static_cast<double>(image.width);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t n = index / p.channels, c = index % p.channels;
      const Moments* m = moments + n * runs * p.channels + c;
      ChannelStatistic result{0, 0, 0};
      bool constant = true;
      for (int64_t run = 0; run < runs; ++run) {
        result.mean += m[run * p.channels].sum;
        result.dot += m[run * p.channels].dot;
        constant = constant && m[run * p.channels].constant;
      }
      result.mean /= pixels;
      if (p.contrast) {
        double squares = 0;
        for (int64_t run = 0; run < runs; ++run) {
          const Moments& r = m[run * p.channels];
          const double d = r.sum / r.count - result.mean;
          squares += r.squares + r.count * d * d;
        }
        // A NaN variance (an infinite pixel) counts as not positive, as in the definition.
        const double variance = squares / pixels;
        if (constant)
          result.mean = static_cast<double>(to_compute(*at<S>(p.x, n, c, 0, 0)));
        else if (variance > 0)
          result.deviation = std::sqrt(variance);
      }
      statistics[index] = result;
    }
  });
}

// The two products between statistic and gate, in float64: they are a few thousand operations.
struct GateNetwork {
  int64_t channels, hidden;
  double *w_down, *b_down, *w_up, *b_up;  // absent biases are zero

  static int64_t count(const ChannelAttentionParams& p) {
    return 2 * p.channels * p.hidden + p.channels + p.hidden;
  }
  GateNetwork(const ChannelAttentionParams& p, double* memory)
      : channels(p.channels),
        hidden(p.hidden),
        w_down(memory),
        b_down(w_down + p.channels * p.hidden),
        w_up(b_down + p.hidden),
        b_up(w_up + p.channels * p.hidden) {}
  template <typename S>
  void load_from(const ChannelAttentionParams& p) {
    const auto copy = [](const void* source, int64_t size, double* destination) {
      for (int64_t i = 0; i < size; ++i)
        destination[i] = source == nullptr
                             ? 0.0
                             : static_cast<double>(to_compute(static_cast<const S*>(source)[i]));
    };
    copy(p.w_down, channels * hidden, w_down);
    copy(p.b_down, hidden, b_down);
    copy(p.w_up, channels * hidden, w_up);
    copy(p.b_up, channels, b_up);
  }
  // z (C) -> before (hidden), the hidden values before relu, and gate (C).
  void evaluate(const double* z, double* before, double* gate) const {
    for (int64_t r = 0; r < hidden; ++r) {
      before[r] = b_down[r];
      for (int64_t c = 0; c < channels; ++c) before[r] += w_down[r * channels + c] * z[c];
    }
    for (int64_t c = 0; c < channels; ++c) {
      double sum = b_up[c];
      for (int64_t r = 0; r < hidden; ++r) sum += w_up[c * hidden + r] * relu(before[r]);
      gate[c] = 1 / (1 + std::exp(-sum));
    }
  }
  // dgate (C) becomes the gradient of sigmoid's argument; dz (C); sums gathers the four gradients.
  void backward(const double* z, const double* before, const double* gate, double* dgate,
                double* dbefore, double* dz, GateNetwork& sums) const {
    for (int64_t r = 0; r < hidden; ++r) dbefore[r] = 0;
    for (int64_t c = 0; c < channels; ++c) {
      dgate[c] = dgate[c] * (1 - gate[c]) * gate[c];
      sums.b_up[c] += dgate[c];
      for (int64_t r = 0; r < hidden; ++r) {
        sums.w_up[c * hidden + r] += dgate[c] * relu(before[r]);
        dbefore[r] += dgate[c] * w_up[c * hidden + r];
      }
    }
    for (int64_t c = 0; c < channels; ++c) dz[c] = 0;
    for (int64_t r = 0; r < hidden; ++r) {
      if (before[r] <= 0) dbefore[r] = 0;
      sums.b_down[r] += dbefore[r];
      for (int64_t c = 0; c < channels; ++c) {
        sums.w_down[r * channels + c] += dbefore[r] * z[c];
        dz[c] += dbefore[r] * w_down[r * channels + c];
      }
    }
  }
  static double relu(double v) { return v < 0 ? 0 : v; }  // NaN passes
};

// y = x * gate, one gate value a channel and image, gate (N, C).
template <typename S>
void multiply_by_channel_gate(const ChannelAttentionParams& p, const PixelRows& image,
                              const typename Compute<S>::type* gates, ParallelFor parallel) {
  using T = typename Compute<S>::type;
  const Walk walk = walk_of<S>({p.x, p.y}, p.channels);
  if (walk == Walk::kPlanes) {
    parallel_for(parallel, p.batch * p.channels, [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane)
        for (int64_t h = 0; h < image.height; ++h) {
          const int64_t n = plane / p.channels, c = plane % p.channels;
          const void* source = at<S>(p.x, n, c, h, 0);
          const T *x = static_cast<const T*>(source), g = gates[plane];
          T* y = static_cast<T*>(static_cast<void*>(at<S>(p.y, n, c, h, 0)));
          sweep<T>(image.width, [&](int64_t i, auto tag) {
            using V = decltype(tag);
            put(y + i, get<V>(x + i) * g);
          });
        }
    });
    return;
  }
  const Tiling tiling(p.batch, image.height, image.width, 1, run_length<T>(p.channels));
  if (walk == Walk::kPixels) {
    parallel_for(parallel, tiling.count(), [&](int64_t begin, int64_t end) {
      const int64_t size = table_size<T>(p.channels);
      Scratch scratch(Scratch::bytes_for<T>(size));
      T* table = scratch.take<T>(size);
      int64_t filled_for = -1;  // the image whose gate the table holds
      for (int64_t index = begin; index < end; ++index) {
        const Tile t = tiling[index];
        if (t.n != filled_for)
          fill_table(table, p.channels, [&](int64_t c) { return gates[t.n * p.channels + c]; });
        filled_for = t.n;
        const void* source = at<S>(p.x, t.n, 0, t.h, t.w);
        const T* x = static_cast<const T*>(source);
        T* y = static_cast<T*>(static_cast<void*>(at<S>(p.y, t.n, 0, t.h, t.w)));
        sweep_tables<T>(t.columns * p.channels, size, [&](int64_t element, int64_t i, auto tag) {
          using V = decltype(tag);
          put(y + element, get<V>(x + element) * get<V>(table + i));
        });
      }
    });
    return;
  }
  const bool pixel_by_pixel = p.x.stride_c == 1 && p.y.stride_c == 1 && p.channels > 1;
  parallel_for(parallel, tiling.count(), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const Tile t = tiling[index];
      const T* gate = gates + t.n * p.channels;
      if (pixel_by_pixel) {
        for (int64_t i = 0; i < t.columns; ++i) {
          const S* source = at<S>(p.x, t.n, 0, t.h, t.w + i);
          S* target = at<S>(p.y, t.n, 0, t.h, t.w + i);
          for (int64_t c = 0; c < p.channels; ++c)
            from_compute(to_compute(source[c]) * gate[c], target + c);
        }
        continue;
      }
      for (int64_t c = 0; c < p.channels; ++c) {
        const S* source = at<S>(p.x, t.n, c, t.h, t.w);
        S* target = at<S>(p.y, t.n, c, t.h, t.w);
        const T g = gate[c];
        if (p.x.stride_w == 1 && p.y.stride_w == 1)
          for (int64_t i = 0; i < t.columns; ++i)
            from_compute(to_compute(source[i]) * g, target + i);
        else
          for (int64_t i = 0; i < t.columns; ++i)
            from_compute(to_compute(source[i * p.x.stride_w]) * g, target + i * p.y.stride_w);
      }
    }
  });
}

template <typename S>
void channel_forward(const ChannelAttentionParams& params, ParallelFor parallel) {
  using T = typename Compute<S>::type;
  ChannelAttentionParams p = params;
  const PixelRows image(p.height, p.width, {&p.x, &p.y});
  const int64_t gate_count = p.batch * p.channels;
  Scratch shared(Scratch::bytes_for<ChannelStatistic>(gate_count) +
                 Scratch::bytes_for<double>(GateNetwork::count(p)) +
                 2 * Scratch::bytes_for<double>(p.channels) + Scratch::bytes_for<double>(p.hidden) +
                 Scratch::bytes_for<T>(gate_count));
  ChannelStatistic* statistics = shared.take<ChannelStatistic>(gate_count);
  GateNetwork network(p, shared.take<double>(GateNetwork::count(p)));
  double* z = shared.take<double>(p.channels);
  double* gate = shared.take<double>(p.channels);
  double* before = shared.take<double>(p.hidden);
  T* gates = shared.take<T>(gate_count);

  network.load_from<S>(p);
  channel_statistics_of<S>(p, FeatureMap{}, image, statistics, parallel);
  for (int64_t n = 0; n < p.batch; ++n) {
    for (int64_t c = 0; c < p.channels; ++c) {
      const ChannelStatistic& s = statistics[n * p.channels + c];
      z[c] = s.mean + s.deviation;
    }
    network.evaluate(z, before, gate);
    for (int64_t c = 0; c < p.channels; ++c) gates[n * p.channels + c] = static_cast<T>(gate[c]);
  }
  if (p.gate != nullptr) store_elements(gates, gate_count, static_cast<S*>(p.gate), 1);
  if (p.y.data != nullptr) multiply_by_channel_gate<S>(p, image, gates, parallel);
}

// dx = grad gate + dz (1 / P + (x - mean) / (P deviation)) for P pixels; the last term is absent
// where the deviation is 0, and the first where grad is the gate's.
template <typename S>
void channel_backward(const ChannelAttentionBackwardParams& params, ParallelFor parallel) {
  using T = typename Compute<S>::type;
  ChannelAttentionBackwardParams b = params;
  const ChannelAttentionParams& p = b.forward;
  FeatureMap grad = b.grad_of_gate ? FeatureMap{} : b.grad;
  const PixelRows image(p.height, p.width, {&b.forward.x, &grad, &b.dx});
  const int64_t gate_count = p.batch * p.channels;
  struct Affine {  // dx = grad * gate + offset + slope * (x - mean)
    T gate, offset, slope, mean;
  };
  Scratch shared(Scratch::bytes_for<ChannelStatistic>(gate_count) +
                 2 * Scratch::bytes_for<double>(GateNetwork::count(p)) +
                 4 * Scratch::bytes_for<double>(p.channels) +
                 2 * Scratch::bytes_for<double>(p.hidden) + Scratch::bytes_for<Affine>(gate_count));
  ChannelStatistic* statistics = shared.take<ChannelStatistic>(gate_count);
  GateNetwork network(p, shared.take<double>(GateNetwork::count(p)));
  GateNetwork sums(p, shared.take<double>(GateNetwork::count(p)));
  double* z = shared.take<double>(p.channels);
  double* gate = shared.take<double>(p.channels);
  double* dgate = shared.take<double>(p.channels);
  double* dz = shared.take<double>(p.channels);
  double* before = shared.take<double>(p.hidden);
  double* dbefore = shared.take<double>(p.hidden);
  Affine* affine = shared.take<Affine>(gate_count);

  network.load_from<S>(p);
  channel_statistics_of<S>(p, grad, image, statistics, parallel);
  const double pixels = static_cast<double>(p.height) * static_cast<double>(p.width);
  for (int64_t n = 0; n < p.batch; ++n) {
    const ChannelStatistic* s = statistics + n * p.channels;
    for (int64_t c = 0; c < p.channels; ++c) {
      z[c] = s[c].mean + s[c].deviation;
      dgate[c] =
          b.grad_of_gate ? static_cast<double>(to_compute(*at<S>(b.grad, n, c, 0, 0))) : s[c].dot;
    }
    network.evaluate(z, before, gate);
    network.backward(z, before, gate, dgate, dbefore, dz, sums);
    for (int64_t c = 0; c < p.channels; ++c) {
      Affine& a = affine[n * p.channels + c];
      a.gate = static_cast<T>(gate[c]);
      a.offset = static_cast<T>(dz[c] / pixels);
      a.slope = s[c].deviation > 0 ? static_cast<T>(dz[c] / (pixels * s[c].deviation)) : T(0);
      a.mean = static_cast<T>(s[c].mean);
    }
  }
  const auto write = [](const double* source, int64_t size, void* destination) {
    if (destination == nullptr) return;
    for (int64_t i = 0; i < size; ++i)
      from_compute(static_cast<T>(source[i]), static_cast<S*>(destination) + i);
  };
  write(sums.w_down, p.channels * p.hidden, b.dw_down);
  write(sums.b_down, p.hidden, b.db_down);
  write(sums.w_up, p.channels * p.hidden, b.dw_up);
  write(sums.b_up, p.channels, b.db_up);
  if (b.dx.data == nullptr) return;

  const Tiling tiling(p.batch, image.height, image.width, 1, run_length<T>(p.channels));
  // x is read for its deviations alone.
  const Walk walk = walk_of<S>({p.contrast ? p.x : FeatureMap{}, grad, b.dx}, p.channels);
  if (walk == Walk::kPlanes) {
    parallel_for(parallel, p.batch * p.channels, [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane)
        for (int64_t h = 0; h < image.height; ++h) {
          const int64_t n = plane / p.channels, c = plane % p.channels;
          const Affine a = affine[plane];
          const void* x_row = at<S>(p.x, n, c, h, 0);
          const void* g_row = grad.data != nullptr ? at<S>(grad, n, c, h, 0) : nullptr;
          const T *x = static_cast<const T*>(x_row), *g = static_cast<const T*>(g_row);
          T* dx = static_cast<T*>(static_cast<void*>(at<S>(b.dx, n, c, h, 0)));
          sweep<T>(image.width, [&](int64_t i, auto tag) {
            using V = decltype(tag);
            V value = V{} + a.offset;
            if (p.contrast) value += a.slope * (get<V>(x + i) - a.mean);
            if (g != nullptr) value += get<V>(g + i) * a.gate;
            put(dx + i, value);
          });
        }
    });
    return;
  }
  if (walk == Walk::kPixels) {
    parallel_for(parallel, tiling.count(), [&](int64_t begin, int64_t end) {
      const int64_t size = table_size<T>(p.channels);
      Scratch scratch(4 * Scratch::bytes_for<T>(size));
      T *gates = scratch.take<T>(size), *offsets = scratch.take<T>(size);
      T *slopes = scratch.take<T>(size), *means = scratch.take<T>(size);
      int64_t filled_for = -1;  // the image that the tables hold
      for (int64_t index = begin; index < end; ++index) {
        const Tile t = tiling[index];
        if (t.n != filled_for) {
          const Affine* a = affine + t.n * p.channels;
          fill_table(gates, p.channels, [&](int64_t c) { return a[c].gate; });
          fill_table(offsets, p.channels, [&](int64_t c) { return a[c].offset; });
          fill_table(slopes, p.channels, [&](int64_t c) { return a[c].slope; });
          fill_table(means, p.channels, [&](int64_t c) { return a[c].mean; });
          filled_for = t.n;
        }
        const void* x_run = at<S>(p.x, t.n, 0, t.h, t.w);
        const void* g_run = grad.data != nullptr ? at<S>(grad, t.n, 0, t.h, t.w) : nullptr;
        const T *x = static_cast<const T*>(x_run), *g = static_cast<const T*>(g_run);
        T* dx = static_cast<T*>(static_cast<void*>(at<S>(b.dx, t.n, 0, t.h, t.w)));
        sweep_tables<T>(t.columns * p.channels, size, [&](int64_t element, int64_t i, auto tag) {
          using V = decltype(tag);
          V value = get<V>(offsets + i);
          if (p.contrast) value += get<V>(slopes + i) * (get<V>(x + element) - get<V>(means + i));
          if (g != nullptr) value += get<V>(g + element) * get<V>(gates + i);
          put(dx + element, value);
        });
      }
    });
    return;
  }
  const int64_t stride = spread_stride<T>(tiling.columns), size = p.channels * stride;
  parallel_for(parallel, tiling.count(), [&](int64_t begin, int64_t end) {
    Scratch scratch(3 * Scratch::bytes_for<T>(size));
    T* x_tile = scratch.take<T>(size);
    T* grad_tile = scratch.take<T>(size);
    T* dx = scratch.take<T>(size);
    for (int64_t index = begin; index < end; ++index) {
      const Tile t = tiling[index];
      const StridedRows<T> x =
          view_run<S>(p.x, t, p.channels, image.height, image.width, x_tile, stride);
      StridedRows<T> g{nullptr, 0};
      if (grad.data != nullptr)
        g = view_run<S>(grad, t, p.channels, image.height, image.width, grad_tile, stride);
      for (int64_t c = 0; c < p.channels; ++c) {
        const Affine a = affine[t.n * p.channels + c];
        const T* x_row = x[c];
        const T* g_row = g.data != nullptr ? g[c] : nullptr;
        T* dx_row = dx + c * stride;
        sweep<T>(t.columns, [&](int64_t i, auto tag) {
          using V = decltype(tag);
          V value = V{} + a.offset;
          if (p.contrast) value += a.slope * (get<V>(x_row + i) - a.mean);
          if (g_row != nullptr) value += get<V>(g_row + i) * a.gate;
          put(dx_row + i, value);
        });
      }
      store_tile<S>(dx, stride, stride, b.dx, t.n, 0, p.channels, t.h, 1, t.w, t.columns,
                    image.height, image.width);
    }
  });
}

// ------------------------------------------------------------------ gated convolution

// gated_forward where the channels of a pixel lie side by side: vectors run over the output
// channels, and no tile is transposed. image: as gated_forward sees it.
template <typename T>
void gated_forward_by_pixel(const GatedConvParams& p, const PixelRows& image,
                            ParallelFor parallel) {
  const Tiling tiling(p.batch, image.height, image.width, 1, run_length<T>(max64(p.c_in, p.c_out)));
  const T *weight = static_cast<const T*>(p.weight), *bias = static_cast<const T*>(p.bias);
  parallel_for(parallel, tiling.count(), [&](int64_t begin, int64_t end) {
    const int64_t packed = Panels<T>(p.c_out).computed() * p.c_in;
    Scratch scratch(Scratch::bytes_for<T>(packed) + Scratch::bytes_for<T>(p.c_out * p.c_in));
    T* panels = scratch.take<T>(packed);
    T* gated = scratch.take<T>(p.c_out * p.c_in);
    int64_t packed_for = -1;  // the image whose gate the panels hold
    for (int64_t index = begin; index < end; ++index) {
      const Tile t = tiling[index];
      if (t.n != packed_for) {
        const T* gate = static_cast<const T*>(p.gate) + t.n * p.c_in;
        for (int64_t o = 0; o < p.c_out; ++o)
          for (int64_t c = 0; c < p.c_in; ++c)
            gated[o * p.c_in + c] = weight[o * p.c_in + c] * gate[c];
        pack_panels(gated, 1, p.c_in, p.c_in, p.c_out, panels);
        packed_for = t.n;
      }
      const T* residual =
          p.residual.data != nullptr ? at<T>(p.residual, t.n, 0, t.h, t.w) : nullptr;
      T* y = at<T>(p.y, t.n, 0, t.h, t.w);
      pixel_product<T>(
          t.columns, p.c_in, p.c_out, at<const T>(p.x, t.n, 0, t.h, t.w), p.x.stride_w, panels,
          [&](int64_t column) { return bias == nullptr ? Vec<T>{} : load(bias + column); },
          [&](int64_t m, int64_t column, Vec<T> sum) {
            if (residual != nullptr) sum += load(residual + m * p.residual.stride_w + column);
            store<T>(y + m * p.y.stride_w + column, sum);
          });
    }
  });
}

template <typename S>
void gated_forward(const GatedConvParams& params, ParallelFor parallel) {
  using T = typename Compute<S>::type;
  GatedConvParams p = params;
  const PixelRows image(p.height, p.width, {&p.x, &p.residual, &p.y});
  if constexpr (std::is_same_v<S, T>) {
    if (p.x.stride_c == 1 && p.x.stride_w != 1 && channels_fill_vectors<S>(p.y, p.c_out) &&
        (p.residual.data == nullptr || p.residual.stride_c == 1))
      return gated_forward_by_pixel<T>(p, image, parallel);
  }
  const Tiling tiling(p.batch, image.height, image.width, 1, run_length<T>(max64(p.c_in, p.c_out)));
  const int64_t stride = spread_stride<T>(tiling.columns);
  Scratch shared(Scratch::bytes_for<T>(p.c_out * p.c_in) + Scratch::bytes_for<T>(p.c_out));
  const T* weight = load_vector<S>(p.weight, p.c_out * p.c_in, shared.take<T>(p.c_out * p.c_in));
  const T* bias = load_vector<S>(p.bias, p.c_out, shared.take<T>(p.c_out));

  parallel_for(parallel, tiling.count(), [&](int64_t begin, int64_t end) {
    Scratch scratch(
        Scratch::bytes_for<T>(packed_size(p.c_out, p.c_in)) +
        Scratch::bytes_for<T>(p.c_out * p.c_in) + Scratch::bytes_for<T>(p.c_in * stride) +
        2 * Scratch::bytes_for<T>(p.c_out * stride) + Scratch::bytes_for<T>(p.c_out * kStrip));
    T* panels = scratch.take<T>(packed_size(p.c_out, p.c_in));
    T* gated = scratch.take<T>(p.c_out * p.c_in);
    T* x = scratch.take<T>(p.c_in * stride);
    T* y_tile = scratch.take<T>(p.c_out * stride);
    T* skip = scratch.take<T>(p.c_out * stride);
    T* strip = scratch.take<T>(p.c_out * kStrip);
    int64_t packed_for = -1;  // the image whose gate the panels hold
    for (int64_t index = begin; index < end; ++index) {
      const Tile t = tiling[index], next = tiling[min64(index + 1, end - 1)];
      if (t.n != packed_for) {
        const S* gate = static_cast<const S*>(p.gate) + t.n * p.c_in;
        for (int64_t o = 0; o < p.c_out; ++o)
          for (int64_t c = 0; c < p.c_in; ++c)
            gated[o * p.c_in + c] = weight[o * p.c_in + c] * to_compute(gate[c]);
        pack_tiles(gated, p.c_in, 1, p.c_out, p.c_in, panels);
        packed_for = t.n;
      }
      load_tile<S>(p.x, t.n, 0, p.c_in, t.h, 1, t.w, t.columns, image.height, image.width, x,
                   stride, stride);
      StridedRows<T> residual{nullptr, 0}, y = rows_in_place<S>(p.y, t);
      if (p.residual.data != nullptr)
        residual = view_run<S>(p.residual, t, p.c_out, image.height, image.width, skip, stride);
      const bool direct = y.data != nullptr;
      if (!direct) y = {y_tile, stride};
      const StridedRows<T> ahead = rows_in_place<S>(p.x, next);
      for (int64_t q = 0; q < t.columns; q += kStrip) {
        const int64_t count = min64(kStrip, t.columns - q);
        if (residual.data != nullptr)
          for (int64_t c = 0; c < p.c_out; ++c) prefetch(residual[c] + q, count);
        if (ahead.data != nullptr && next.columns == t.columns)
          for (int64_t c = 0; c < p.c_in; ++c) prefetch(ahead[c] + q, count);
        tiled_product<T>(
            p.c_out, p.c_in, 0, padded<T>(count), panels, StridedRows<T>{x + q, stride},
            [&](int64_t m, int64_t, int i, int) {
              return bias == nullptr ? Vec<T>{} : broadcast(bias[m + i]);
            },
            [&](int64_t m, int64_t column, int i, int j, Vec<T> v) {
              store<T>(strip + (m + i) * kStrip + column + j, v);
            });
        for (int64_t c = 0; c < p.c_out; ++c) {
          const T* sums = strip + c * kStrip;
          const T* r = residual.data != nullptr ? residual[c] + q : nullptr;
          T* target = const_cast<T*>(y[c]) + q;
          sweep<T>(count, [&](int64_t i, auto tag) {
            using V = decltype(tag);
            V value = get<V>(sums + i);
            if (r != nullptr) value += get<V>(r + i);
            put(target + i, value);
          });
        }
      }
      if (!direct)
        store_tile<S>(y_tile, stride, stride, p.y, t.n, 0, p.c_out, t.h, 1, t.w, t.columns,
                      image.height, image.width);
    }
  });
}

// With v = W^T grad: dx = gate v,  dgate = sum_p x v,  dW = sum_p grad (gate x)^T,  db = sum_p
// grad.
template <typename S>
void gated_backward(const GatedConvBackwardParams& params, ParallelFor parallel) {
  using T = typename Compute<S>::type;
  GatedConvBackwardParams b = params;
  const GatedConvParams& p = b.forward;
  const PixelRows image(p.height, p.width, {&b.forward.x, &b.grad, &b.dx});
  const Tiling tiling(p.batch, image.height, image.width, 1, run_length<T>(max64(p.c_in, p.c_out)));
  const int64_t stride = spread_stride<T>(tiling.columns), runs = tiling.tiles_h * tiling.tiles_w;
  const int64_t weight_size = p.c_out * p.c_in, packed = packed_size(p.c_in, p.c_out);
  const Chunks chunks(tiling.count());
  const int64_t chunk_size = weight_size + p.c_out;  // dW, then db
  const bool want_dx = b.dx.data != nullptr, want_dgate = b.dgate != nullptr;
  const bool want_dw = b.dweight != nullptr;
  const int64_t dots = want_dgate ? tiling.count() * p.c_in : 0;

  Scratch shared(Scratch::bytes_for<T>(packed) + Scratch::bytes_for<T>(p.batch * p.c_in) +
                 Scratch::bytes_for<T>(chunks.count * chunk_size) + Scratch::bytes_for<T>(dots));
  const LeftOperand<T> weight_transposed =
      pack_weight<S>(p.weight, p.c_out, p.c_in, true, shared.take<T>(packed));
  const T* gates = load_vector<S>(p.gate, p.batch * p.c_in, shared.take<T>(p.batch * p.c_in));
  T* partial = shared.take<T>(chunks.count * chunk_size);
  T* gate_partial = shared.take<T>(dots);  // (N, runs, c_in)

  parallel_for(parallel, chunks.count, [&](int64_t begin, int64_t end) {
    Scratch scratch(2 * Scratch::bytes_for<T>(p.c_in * stride) +
                    Scratch::bytes_for<T>(p.c_out * stride));
    T* x = scratch.take<T>(p.c_in * stride);
    T* v = scratch.take<T>(p.c_in * stride);
    T* gradient = scratch.take<T>(p.c_out * stride);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      T* dw_sum = partial + chunk * chunk_size;
      for (int64_t index = chunks.begin(chunk); index < chunks.end(chunk); ++index) {
        const Tile t = tiling[index];
        const T* gate = gates + t.n * p.c_in;
        load_tile<S>(b.grad, t.n, 0, p.c_out, t.h, 1, t.w, t.columns, image.height, image.width,
                     gradient, stride, stride);
        if (want_dgate || want_dw)
          load_tile<S>(p.x, t.n, 0, p.c_in, t.h, 1, t.w, t.columns, image.height, image.width, x,
                       stride, stride);
        if (b.dbias != nullptr)
          accumulate_row_sums(p.c_out, stride, StridedRows<T>{gradient, stride},
                              dw_sum + weight_size);
        if (want_dx || want_dgate) {
          product<T>(Start::kZero, p.c_in, p.c_out, stride, weight_transposed,
                     StridedRows<T>{gradient, stride}, nullptr, v, stride);
          zero_tail(v, p.c_in, stride, t.columns);  // a NaN weight would have left NaN there
        }
        for (int64_t c = 0; c < p.c_in; ++c) {
          T *x_row = x + c * stride, *v_row = v + c * stride;
          if (want_dgate) {
            Vec<T> sum{};
            for (int64_t i = 0; i < stride; i += Simd<T>::width)
              sum += load(x_row + i) * load(v_row + i);
            gate_partial[index * p.c_in + c] = horizontal_sum<T>(sum);
          }
          if (want_dx)
            for (int64_t i = 0; i < stride; i += Simd<T>::width)
              store<T>(v_row + i, load(v_row + i) * gate[c]);
          if (want_dw)
            for (int64_t i = 0; i < t.columns; ++i) x_row[i] *= gate[c];
        }
        if (want_dx)
          store_tile<S>(v, stride, stride, b.dx, t.n, 0, p.c_in, t.h, 1, t.w, t.columns,
                        image.height, image.width);
        if (want_dw)
          accumulate_inner_products(p.c_out, p.c_in, stride, StridedRows<T>{gradient, stride},
                                    StridedRows<T>{x, stride}, dw_sum, p.c_in);
      }
    }
  });
  if (want_dw)
    reduce_chunks(partial, chunks.count, chunk_size, weight_size, static_cast<S*>(b.dweight));
  if (b.dbias != nullptr)
    reduce_chunks(partial + weight_size, chunks.count, chunk_size, p.c_out,
                  static_cast<S*>(b.dbias));
  if (want_dgate)
    for (int64_t n = 0; n < p.batch; ++n)
      for (int64_t c = 0; c < p.c_in; ++c) {
        double sum = 0;
        for (int64_t run = 0; run < runs; ++run)
          sum += static_cast<double>(gate_partial[(n * runs + run) * p.c_in + c]);
        from_compute(static_cast<T>(sum), static_cast<S*>(b.dgate) + n * p.c_in + c);
      }
}

}  // namespace

void pixel_attention(const PixelAttentionParams& params, ParallelFor parallel) {
  dispatch_scalar(params.kind,
                  [&](auto element) { pixel_forward<decltype(element)>(params, parallel); });
}
void pixel_attention_backward(const PixelAttentionBackwardParams& params, ParallelFor parallel) {
  dispatch_scalar(params.forward.kind,
                  [&](auto element) { pixel_backward<decltype(element)>(params, parallel); });
}
void spatial_attention(const SpatialAttentionParams& params, ParallelFor parallel) {
  dispatch_scalar(params.kind,
                  [&](auto element) { spatial_forward<decltype(element)>(params, parallel); });
}
void spatial_attention_backward(const SpatialAttentionBackwardParams& params,
                                ParallelFor parallel) {
  dispatch_scalar(params.forward.kind,
                  [&](auto element) { spatial_backward<decltype(element)>(params, parallel); });
}
void channel_attention(const ChannelAttentionParams& params, ParallelFor parallel) {
  dispatch_scalar(params.kind,
                  [&](auto element) { channel_forward<decltype(element)>(params, parallel); });
}
void channel_attention_backward(const ChannelAttentionBackwardParams& params,
                                ParallelFor parallel) {
  dispatch_scalar(params.forward.kind,
                  [&](auto element) { channel_backward<decltype(element)>(params, parallel); });
}
void gated_conv1x1(const GatedConvParams& params, ParallelFor parallel) {
  dispatch_scalar(params.kind,
                  [&](auto element) { gated_forward<decltype(element)>(params, parallel); });
}
void gated_conv1x1_backward(const GatedConvBackwardParams& params, ParallelFor parallel) {
  dispatch_scalar(params.forward.kind,
                  [&](auto element) { gated_backward<decltype(element)>(params, parallel); });
}

}  // namespace SR_KERNELS_ISA
}  // namespace sr_kernels
