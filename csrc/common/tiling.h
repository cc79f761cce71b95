// How a feature map is cut into the pieces that CPU kernels work on. Internal linkage, as simd.h.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "common/simd.h"

namespace sr_kernels {
namespace SR_KERNELS_ISA {
namespace {

// A rectangle of the image. Rows of a tile in scratch are row_stride apart.
struct Tile {
  int64_t n, h, w, rows, columns;
};

struct Tiling {
  int64_t batch, height, width, rows, columns, tiles_h, tiles_w;

  // At most max_rows x max_columns pixels a tile, columns of nearly equal width: a multiple of
  // `multiple` (of which max_columns is one) in every tile but a row's last.
  Tiling(int64_t batch_, int64_t height_, int64_t width_, int64_t max_rows, int64_t max_columns,
         int64_t multiple = 1)
      : batch(batch_), height(height_), width(width_) {
    tiles_w = max64(1, ceil_div(width, max_columns));
    columns = max64(1, ceil_div(ceil_div(width, tiles_w), multiple) * multiple);
    rows = max64(1, min64(max_rows, height));
    tiles_h = ceil_div(height, rows);
    tiles_w = ceil_div(width, columns);
  }
  int64_t count() const { return batch * tiles_h * tiles_w; }
  Tile operator[](int64_t index) const {
    Tile tile;
    tile.w = index % tiles_w * columns;
    index /= tiles_w;
    tile.h = index % tiles_h * rows;
    tile.n = index / tiles_h;
    tile.rows = min64(rows, height - tile.h);
    tile.columns = min64(columns, width - tile.w);
    return tile;
  }
};

// A dense vector as compute elements; nullptr stays nullptr.
template <typename S, typename T>
const T* load_vector(const void* source, int64_t count, T* destination) {
  if (source == nullptr) return nullptr;
  load_elements(static_cast<const S*>(source), 1, count, destination);
  return destination;
}

// An image as an operator without a spatial neighbourhood sees it: pixels in a few long rows.
// Where every map's pixels lie at one distance (contiguous and channels_last ones do), the whole
// image becomes one row, so that narrow images fill vectors as well as wide ones do.
struct PixelRows {
  int64_t height, width;

  PixelRows(int64_t height_, int64_t width_, std::initializer_list<FeatureMap*> maps)
      : height(height_), width(width_) {
    bool one_distance = true;
    for (const FeatureMap* map : maps)
      if (map->data != nullptr && height > 1 && width > 1)
        one_distance = one_distance && map->stride_h == width * map->stride_w;
    if (!one_distance) return;
    for (FeatureMap* map : maps)
      if (width == 1) map->stride_w = map->stride_h;
    width *= height;
    height = 1;
  }
};

// Pixels in a tile of one row, such that `channels` rows of it are about 128 KiB: a few such tiles
// share the second-level cache.
template <typename T>
int64_t run_length(int64_t channels) {
  const int64_t pixels = (int64_t{128} << 10) / static_cast<int64_t>(sizeof(T)) / channels;
  return max64(64, min64(1024, pixels / 16 * 16));
}

// The distance between a tile's rows: an odd number of cache lines, so that one column of a tile,
// which is what a channels_last pixel becomes, spreads over all sets of the first-level cache.
template <typename T>
SR_INLINE int64_t spread_stride(int64_t columns) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  return (ceil_div(columns, kLine) | 1) * kLine;
}

// The rows of a one-row tile, one per channel, for reading exactly tile.columns elements each:
// where they lie, if they can be read there, else copied to buffer (channels x row_stride).
template <typename S, typename T>
StridedRows<T> view_run(const FeatureMap& map, const Tile& tile, int64_t channels, int64_t height,
                        int64_t width, T* buffer, int64_t row_stride) {
  if constexpr (std::is_same_v<S, T>) {
    if (map.stride_w == 1) return {at<S>(map, tile.n, 0, tile.h, tile.w), map.stride_c};
  }
  load_tile<S>(map, tile.n, 0, channels, tile.h, 1, tile.w, tile.columns, height, width, buffer,
               row_stride, row_stride);
  return {buffer, row_stride};
}

// Calls function(i, V{}) over [0, count): V is Vec<T> for whole vectors, T for the rest. Reads and
// writes nothing past count, unlike loops over padded rows.
template <typename T, typename Function>
SR_INLINE void sweep(int64_t count, const Function& function) {
  int64_t i = 0;
  for (; i + Simd<T>::width <= count; i += Simd<T>::width) function(i, Vec<T>{});
  for (; i < count; ++i) function(i, T{});
}
template <typename V, typename T>
SR_INLINE V get(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <typename V, typename T>
SR_INLINE void put(T* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

}  // namespace
}  // namespace SR_KERNELS_ISA
}  // namespace sr_kernels
