// A tile of pixels and all or some of their channels, between global and shared memory.
//
// kBlockThreads threads share it so that the lanes of a warp lie along what is contiguous in the
// feature map: runs of pixels of a channel, or, channels_last, 8 runs of channels of 4 pixels. A
// run is one access: 16 bytes, 8, or one element where alignment allows no more.
#pragma once

#include "common/activation.h"
#include "common/tile_product.cuh"

namespace sr_kernels {

constexpr int kWalkPixels = 32, kWalkChannels = 8;  // what all threads cover in one step

struct Pixel {
  int64_t n;
  int h, w;
  bool exists;  // false: beyond the last pixel, nothing else is meant
};

// What a thread takes at once of a channel: a run of `count` pixels from `at` on, pixel `index` of
// the tile.
struct PixelUnit {
  int index, count;
  Pixel at;
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
  // The units of a tile of kPixels. Runs are of one row where kRun divides the width.
  static constexpr bool kAligned = true;  // a run's index is a multiple of kRun
  template <int kRun, int kPixels>
  static constexpr int kUnits = kPixels / kRun;
  template <int kRun>
  SR_DEVICE PixelUnit unit(int i) const {
    return {i * kRun, kRun, (*this)[i * kRun]};
  }
};

// A tile of kRows x kColumns pixels with a halo of one (kHalo 1) or none, row after row. h0, w0 of
// its first pixel: -1 at the image's corner.
template <int kRows, int kColumns, int kHalo>
struct RectanglePixels {
  static constexpr int kWidth = kColumns + 2 * kHalo, kCount = (kRows + 2 * kHalo) * kWidth;
  ImageSize size;
  int64_t n;
  int h0, w0;
  SR_DEVICE Pixel operator[](int i) const {
    const Pixel at{n, h0 + i / kWidth, w0 + i % kWidth, i < kCount};
    return kHalo > 0 ? at : Pixel{n, at.h, at.w, at.exists && size.has(at.h, at.w)};
  }
  // A row of a halo's units: its first pixel, runs, its last pixel. Padding comes at the end.
  static constexpr bool kAligned = kHalo == 0;
  template <int kRun>
  static constexpr int kRowUnits = kColumns / kRun + 2 * kHalo;
  template <int kRun, int kPixels>
  static constexpr int kUnits = kRowUnits<kRun> * (kRows + 2 * kHalo) + kPixels - kCount;
  template <int kRun>
  SR_DEVICE PixelUnit unit(int i) const {
    const int row = i / kRowUnits<kRun>, u = i % kRowUnits<kRun>;
    if (row >= kRows + 2 * kHalo) {
      const int index = kCount + i - kRowUnits<kRun> * (kRows + 2 * kHalo);
      return {index, 1, (*this)[index]};
    }
    const bool single = kHalo > 0 && (u == 0 || u == kRowUnits<kRun> - 1);
    const int column = u == 0 ? 0 : (u - kHalo) * kRun + kHalo;
    const int index = row * kWidth + column;
    return {index, single ? 1 : kRun, (*this)[index]};
  }
};

// The first pixel and channel of a thread; it goes on in steps of kWalkPixels and kWalkChannels.
SR_DEVICE int walk_pixel(const FeatureMap& map, int thread) {
  return map.stride_c == 1 ? thread / kWalkChannels : thread % kWalkPixels;
}
SR_DEVICE int walk_channel(const FeatureMap& map, int thread) {
  return map.stride_c == 1 ? thread % kWalkChannels : thread / kWalkPixels;
}

// `places` of a map's runs, of channels or of pixels (of which an image must have a multiple, too),
// for with_access_width; odd where their elements do not lie side by side.
template <typename E>
SR_DEVICE uint64_t run_places(const FeatureMap& map, bool of_channels) {
  if (map.data == nullptr) return 0;
  if ((of_channels ? map.stride_c : map.stride_w) != 1) return 1;
  const int64_t strides = map.stride_n | map.stride_h | (of_channels ? map.stride_w : map.stride_c);
  return place_of<E>(map.data) | static_cast<uint64_t>(strides);
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
// A run of kCount from there on.
template <typename E, int kCount>
SR_DEVICE Vector<E, kCount> load_run(const FeatureMap& map, const Pixel& at, int channel) {
  return load_global<Vector<E, kCount>>(static_cast<const E*>(map.data) +
                                        element_offset(map, at.n, channel, at.h, at.w));
}
template <typename E, int kCount>
SR_DEVICE void store_run(const FeatureMap& map, const Pixel& at, int channel,
                         const Vector<E, kCount>& run) {
  store_global(static_cast<E*>(map.data) + element_offset(map, at.n, channel, at.h, at.w), run);
}

// value += the run there; the run there = value.
template <typename E, int kCount>
SR_DEVICE void add_run(float (&value)[kCount], const FeatureMap& map, const Pixel& at,
                       int channel) {
  const auto run = load_run<E, kCount>(map, at, channel);
#pragma unroll
  for (int i = 0; i < kCount; ++i) value[i] += to_float(run.element[i]);
}
template <typename E, int kCount>
SR_DEVICE void put_run(const float (&value)[kCount], const FeatureMap& map, const Pixel& at,
                       int channel) {
  Vector<E, kCount> run;
#pragma unroll
  for (int i = 0; i < kCount; ++i) run.element[i] = from_float<E>(value[i]);
  store_run(map, at, channel, run);
}

// Activations of an instruction or two are applied to sums in registers; exp and erf, inlined for
// each of them, would push them out.
SR_HOST_DEVICE bool fits_in_epilogue(Activation activation) {
  return activation != Activation::kGelu && activation != Activation::kSilu;
}
SR_DEVICE float activate_in_epilogue(Activation activation, float slope, float z) {
  if (activation == Activation::kRelu) return activate(Activation::kRelu, z, slope);
  if (activation == Activation::kLeakyRelu) return activate(Activation::kLeakyRelu, z, slope);
  return z;
}

// Their derivatives.
SR_DEVICE float derivative_in_epilogue(Activation activation, float slope, float z) {
  if (activation == Activation::kRelu) return activation_derivative(Activation::kRelu, z, slope);
  if (activation == Activation::kLeakyRelu)
    return activation_derivative(Activation::kLeakyRelu, z, slope);
  return 1.0f;
}

// Sums of a product, 64 channels x kPixels pixels, on their way to a feature map: float32 in shared
// memory, in the order of the map.
template <int kPixels>
struct SumStage {
  static constexpr int kLdChannel = kPixels + 8, kLdPixel = kProductRows + 4;
  static constexpr int kFloats = kProductRows * kLdChannel > kPixels* kLdPixel
                                     ? kProductRows * kLdChannel
                                     : kPixels * kLdPixel;
  static constexpr int kBytes = 4 * kFloats;
  float* data;
  bool by_pixel;  // [pixel][channel], else [channel][pixel]

  SR_DEVICE explicit SumStage(const FeatureMap& map)
      : data(shared_array<float>(0, kFloats)), by_pixel(map.stride_c == 1) {}
  SR_DEVICE float* at(int channel, int pixel) const {
    return data + (by_pixel ? pixel * kLdPixel + channel : channel * kLdChannel + pixel);
  }

  // sums + bias, which is of the tile's first channel (nullptr: none). Barriers before and after
  // are the caller's.
  template <typename E, typename Product>
  SR_DEVICE void put(const Product& product, const E* bias, int channels, int thread) const {
    product.visit(thread, [&](int channel, int pixel, float first, float second) {
      float b = 0.0f;
      if (bias != nullptr && channel < channels) b = to_float(load_global<E>(bias + channel));
      float* to = at(channel, pixel);
      if (by_pixel) {
        store_shared<float>(to, first + b);
        store_shared<float>(to + kLdPixel, second + b);
      } else {
        store_shared(to, Vector<float, 2>{{first + b, second + b}});
      }
    });
  }

  template <int kCount>
  SR_DEVICE void load(float (&run)[kCount], int channel, int pixel) const {
    constexpr int kPart = kCount < 4 ? kCount : 4;
    const float* from = at(channel, pixel);
#pragma unroll
    for (int i = 0; i < kCount; i += kPart) {
      const auto part = load_shared<Vector<float, kPart>>(from + i);
#pragma unroll
      for (int j = 0; j < kPart; ++j) run[i + j] = part.element[j];
    }
  }

  // function(at, channel, pixel, run) for all runs, of the width that `places` (those of all maps
  // that function touches) allows: float (&run)[width], channels or pixels from there on.
  template <typename E, typename Pixels, typename Function>
  SR_DEVICE void visit(uint64_t places, const Pixels& pixels, int width, int channels, int thread,
                       const Function& function) const {
    places |= static_cast<uint64_t>(by_pixel ? channels : width);
    with_access_width<E>(places, [&](auto constant) {
      constexpr int kRun = constant;
      float run[kRun];
      if (by_pixel) {
        for (int i = thread / kWalkChannels; i < kPixels; i += kWalkPixels) {
          const Pixel at = pixels[i];
          if (!at.exists) continue;
#pragma unroll 1
          for (int c = thread % kWalkChannels * kRun; c < channels; c += kWalkChannels * kRun) {
            load(run, c, i);
            function(at, c, i, run);
          }
        }
      } else {
        constexpr int kUnits = kPixels / kRun;
        const PixelUnit unit = pixels.template unit<kRun>(thread % kUnits);
        if (!unit.at.exists) return;
#pragma unroll 1
        for (int c = thread / kUnits; c < channels; c += kBlockThreads / kUnits) {
          load(run, c, unit.index);
          function(unit.at, c, unit.index, run);
        }
      }
    });
  }
};

}  // namespace sr_kernels
