// Mean and covariance of a feature map's channels, on the CPU: what BatchNorm behind a 1x1
// convolution needs, since its batch statistics are w . mean + b and w^T covariance w.
//
//   mean = mean_p x_p,  covariance = mean_p (x_p - mean)(x_p - mean)^T
//
// Tile: a run of pixels, all channels, [channel][pixel]. Pixels are dealt to a fixed number of
// chunks. A chunk subtracts the mean of its first tile from all of them, so that little cancels
// where means are large; products are summed in float32 over one tile, in float64 beyond it. Chunks
// are merged in order (Chan, Golub, LeVeque, 1979). Of the products one triangle is computed.
//
// Backward: dx_p = (dmean + (G + G^T)(x_p - mean)) / pixels, with G the covariance's gradient.
// Gradients that reached x by other ways (a convolution, a residual) are added as it is stored.
//
// Floor, float32, per pixel: 4 C bytes and C (C + 1) FLOP forward, 8 C bytes and 2 C^2 FLOP
// backward: bound by arithmetic. Measured fraction: unmeasured.
#include "channel_moments/params.h"

#include "common/tiling.h"

namespace sr_kernels {
namespace SR_KERNELS_ISA {
namespace {

constexpr int64_t kTilePixels = 256;
// Rows of the covariance at a time; columns beyond the last of them are left out.
constexpr int64_t kTriangleRows = 3 * kInnerRows;

template <typename S>
void forward(ChannelMomentsParams p, ParallelFor parallel) {
  using T = typename Compute<S>::type;
  const PixelRows image(p.height, p.width, {&p.x});
  const Tiling tiling(p.batch, image.height, image.width, 1, kTilePixels);
  const int64_t c = p.channels, stride = spread_stride<T>(padded<T>(tiling.columns));
  const Chunks chunks(tiling.count());
  const int64_t chunk_size = 1 + c + c * c;  // pixels, their mean, products of what differs from it
  Scratch shared(Scratch::bytes_for<double>(chunks.count * chunk_size));
  double* partial = shared.take<double>(chunks.count * chunk_size);

  const int64_t bytes = Scratch::bytes_for<T>(c * stride) + 2 * Scratch::bytes_for<T>(c) +
                        Scratch::bytes_for<T>(c * c);
  parallel_for_scratch(
      parallel, chunks.count, bytes, [&](Scratch& scratch, int64_t begin, int64_t end) {
        T* x = scratch.take<T>(c * stride);
        T* sum = scratch.take<T>(c);
        T* origin = scratch.take<T>(c);
        T* products = scratch.take<T>(c * c);
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          double* count = partial + chunk * chunk_size;
          double *mean = count + 1, *moments = mean + c;
          for (int64_t index = chunks.begin(chunk); index < chunks.end(chunk); ++index) {
            const Tile t = tiling[index];
            const int64_t used = padded<T>(t.columns);
            const bool first = index == chunks.begin(chunk);
            load_tile<S>(p.x, t.n, 0, c, t.h, 1, t.w, t.columns, image.height, image.width, x,
                         stride, stride);
            const StridedRows<T> rows{x, stride};
            std::memset(sum, 0, sizeof(T) * static_cast<size_t>(c));
            std::memset(products, 0, sizeof(T) * static_cast<size_t>(c * c));
            if (first) {
              accumulate_row_sums(c, used, rows, sum);
              for (int64_t k = 0; k < c; ++k) {
                const T mean_of_tile = sum[k] / T(t.columns);
                origin[k] =
                    std::isfinite(mean_of_tile) ? mean_of_tile : T(0);  // x - inf is no number
                sum[k] = T(0);
              }
            }
            for (int64_t k = 0; k < c; ++k)
              for (int64_t i = 0; i < t.columns; ++i) x[k * stride + i] -= origin[k];
            accumulate_row_sums(c, used, rows, sum);
            for (int64_t m = 0; m < c; m += kTriangleRows) {
              const int64_t count_m = min64(kTriangleRows, c - m);
              accumulate_inner_products(count_m, m + count_m, used,
                                        StridedRows<T>{x + m * stride, stride}, rows,
                                        products + m * c, c);
            }
            *count += static_cast<double>(t.columns);
            for (int64_t k = 0; k < c; ++k) mean[k] += static_cast<double>(sum[k]);
            for (int64_t i = 0; i < c * c; ++i) moments[i] += static_cast<double>(products[i]);
          }
          for (int64_t k = 0; k < c; ++k) mean[k] /= *count;  // less the origin, for now
          for (int64_t m = 0; m < c; ++m)
            for (int64_t k = 0; k <= m; ++k) moments[m * c + k] -= *count * mean[m] * mean[k];
          for (int64_t k = 0; k < c; ++k) mean[k] += static_cast<double>(origin[k]);
        }
      });

  double pixels = 0;
  for (int64_t k = 0; k < c; ++k) p.mean[k] = 0;
  for (int64_t i = 0; i < c * c; ++i) p.covariance[i] = 0;
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const double* count = partial + chunk * chunk_size;
    pixels += *count;
    for (int64_t k = 0; k < c; ++k) p.mean[k] += *count * count[1 + k];
  }
  for (int64_t k = 0; k < c; ++k) p.mean[k] /= pixels;
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    double* count = partial + chunk * chunk_size;
    double *mean = count + 1, *moments = mean + c;
    for (int64_t k = 0; k < c; ++k) mean[k] -= p.mean[k];
    for (int64_t m = 0; m < c; ++m)
      for (int64_t k = 0; k <= m; ++k)
        p.covariance[m * c + k] += moments[m * c + k] + *count * mean[m] * mean[k];
  }
  for (int64_t m = 0; m < c; ++m)
    for (int64_t k = 0; k <= m; ++k) {
      p.covariance[m * c + k] /= pixels;
      p.covariance[k * c + m] = p.covariance[m * c + k];
    }
}

template <typename S>
void backward(ChannelMomentsBackwardParams params, ParallelFor parallel) {
  using T = typename Compute<S>::type;
  ChannelMomentsParams& p = params.forward;
  const double pixels = static_cast<double>(p.batch * p.height * p.width);
  const PixelRows image(p.height, p.width,
                        {&p.x, &params.others[0], &params.others[1], &params.dx});
  const Tiling tiling(p.batch, image.height, image.width, 1, kTilePixels);
  const int64_t c = p.channels, stride = spread_stride<T>(padded<T>(tiling.columns));
  Scratch shared(Scratch::bytes_for<double>(c * c) + Scratch::bytes_for<T>(packed_size(c, c)) +
                 2 * Scratch::bytes_for<T>(c));
  double* both = shared.take<double>(c * c);  // (G + G^T) / pixels
  for (int64_t m = 0; m < c; ++m)
    for (int64_t k = 0; k < c; ++k)
      both[m * c + k] =
          (params.covariance_gradient[m * c + k] + params.covariance_gradient[k * c + m]) / pixels;
  const T* weight = pack_tiles(both, c, 1, c, c, shared.take<T>(packed_size(c, c)));
  T* mean = shared.take<T>(c);
  T* start = shared.take<T>(c);
  for (int64_t k = 0; k < c; ++k) {
    mean[k] = static_cast<T>(p.mean[k]);
    start[k] = static_cast<T>(params.mean_gradient[k] / pixels);
  }
  // Whether accumulators become dx's rows directly.
  bool direct = params.dx.stride_w == 1;
  for (const FeatureMap& other : params.others)
    direct = direct && (other.data == nullptr || other.stride_w == 1);
  const int64_t bytes = 2 * Scratch::bytes_for<T>(c * stride);
  parallel_for_scratch(
      parallel, tiling.count(), bytes, [&](Scratch& scratch, int64_t begin, int64_t end) {
        T* x = scratch.take<T>(c * stride);
        T* dx = scratch.take<T>(c * stride);
        const auto start_at = [&](int64_t m, int64_t, int i, int) {
          return broadcast(start[m + i]);
        };
        const StridedRows<T> b{x, stride};
        for (int64_t index = begin; index < end; ++index) {
          const Tile t = tiling[index];
          const int64_t used = padded<T>(t.columns);
          load_tile<S>(p.x, t.n, 0, c, t.h, 1, t.w, t.columns, image.height, image.width, x, stride,
                       stride);
          for (int64_t k = 0; k < c; ++k)
            for (int64_t i = 0; i < used; ++i) x[k * stride + i] -= mean[k];
          const int64_t whole = direct ? t.columns / Simd<T>::width * Simd<T>::width : 0;
          S* dx_row = at<S>(params.dx, t.n, 0, t.h, t.w);
          tiled_product<T>(
              c, c, 0, whole, weight, b, start_at,
              [&](int64_t m, int64_t column, int i, int j, Vec<T> v) {
                for (const FeatureMap& other : params.others)
                  if (other.data != nullptr)
                    v += load_vector_of(at<S>(other, t.n, m + i, t.h, t.w + column + j));
                store_vector_of(dx_row + (m + i) * params.dx.stride_c + column + j, v);
              });
          if (whole == t.columns) continue;
          tiled_product<T>(c, c, whole, used, weight, b, start_at,
                           [&](int64_t m, int64_t column, int i, int j, Vec<T> v) {
                             store<T>(dx + (m + i) * stride + column + j, v);
                           });
          for (const FeatureMap& other : params.others) {
            if (other.data == nullptr) continue;
            load_tile<S>(other, t.n, 0, c, t.h, 1, t.w, t.columns, image.height, image.width, x,
                         stride,
                         stride);  // in the place of x, which is not needed any more
            for (int64_t k = 0; k < c; ++k)
              for (int64_t i = whole; i < used; ++i) dx[k * stride + i] += x[k * stride + i];
          }
          store_tile<S>(dx + whole, stride, stride, params.dx, t.n, 0, c, t.h, 1, t.w + whole,
                        t.columns - whole, image.height, image.width);
        }
      });
}

}  // namespace

void channel_moments(const ChannelMomentsParams& params, ParallelFor parallel) {
  dispatch_scalar(params.kind, [&](auto element) { forward<decltype(element)>(params, parallel); });
}
void channel_moments_backward(const ChannelMomentsBackwardParams& params, ParallelFor parallel) {
  dispatch_scalar(params.forward.kind,
                  [&](auto element) { backward<decltype(element)>(params, parallel); });
}

}  // namespace SR_KERNELS_ISA
}  // namespace sr_kernels
