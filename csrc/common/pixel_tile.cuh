// A tile of pixels and all or some of their channels, between global and shared memory.
//
// kBlockThreads threads share it so that the lanes of a warp lie along what is contiguous in the
// feature map: 32 pixels of one channel, or, channels_last, 8 channels of 4 pixels.
#pragma once

#include "common/tile_product.cuh"

namespace sr_kernels {

constexpr int kWalkPixels = 32, kWalkChannels = 8;  // what all threads cover in one step

struct Pixel {
  int64_t n;
  int h, w;
  bool exists;  // false: beyond the last pixel, nothing else is meant
};

struct ImageSize {
  int64_t batch;
  int height, width;
  SR_HOST_DEVICE int64_t pixels() const { return batch * height * width; }
  SR_HOST_DEVICE bool has(int h, int w) const {
    return h >= 0 && h < height && w >= 0 && w < width;
  }
};

// Consecutive pixels of the batch, row after row, image after image: no size is awkward.
struct PixelRun {
  ImageSize size;
  int64_t first, n0;
  int h0, w0;

  SR_DEVICE PixelRun(ImageSize size_, int64_t first_) : size(size_), first(first_) {
    w0 = static_cast<int>(first % size.width);
    const int64_t row = first / size.width;
    h0 = static_cast<int>(row % size.height);
    n0 = row / size.height;
  }
  SR_DEVICE Pixel operator[](int i) const {
    const unsigned w = static_cast<unsigned>(w0) + i, width = size.width;
    const unsigned h = static_cast<unsigned>(h0) + w / width, height = size.height;
    return {n0 + h / height, static_cast<int>(h % height), static_cast<int>(w % width),
            first + i < size.pixels()};
  }
};

// The first pixel and channel of a thread; it goes on in steps of kWalkPixels and kWalkChannels.
SR_DEVICE int walk_pixel(const FeatureMap& map, int thread) {
  return map.stride_c == 1 ? thread / kWalkChannels : thread % kWalkPixels;
}
SR_DEVICE int walk_channel(const FeatureMap& map, int thread) {
  return map.stride_c == 1 ? thread % kWalkChannels : thread / kWalkPixels;
}

SR_DEVICE int64_t element_offset(const FeatureMap& map, int64_t n, int64_t c, int64_t h,
                                 int64_t w) {
  return n * map.stride_n + c * map.stride_c + h * map.stride_h + w * map.stride_w;
}
template <typename E>
SR_DEVICE E load_element(const FeatureMap& map, int64_t n, int64_t c, int64_t h, int64_t w) {
  return load_global<E>(static_cast<const E*>(map.data) + element_offset(map, n, c, h, w));
}
template <typename E>
SR_DEVICE void store_element(const FeatureMap& map, int64_t n, int64_t c, int64_t h, int64_t w,
                             E value) {
  store_global<E>(static_cast<E*>(map.data) + element_offset(map, n, c, h, w), value);
}

}  // namespace sr_kernels
