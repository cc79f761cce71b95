// The index arithmetic of (shifted) windows: roll, partition, Swin's shift mask and relative
// position. One definition for CPU, CUDA and tests; none of these is ever a tensor.
//
// The image is rolled by (-shift_h, -shift_w), as torch.roll does, and cut into windows of
// window_h x window_w pixels; tokens of a window are numbered in row-major order. Window (a, b),
// token i, is the pixel
//
//   ((a * window_h + i / window_w + shift_h) mod height,
//    (b * window_w + i % window_w + shift_w) mod width)
//
// Sources: Swin Transformer (Liu et al., ICCV 2021) for the mask and the bias index.
#pragma once

#include "common/platform.h"

namespace sr_kernels {

struct WindowGeometry {
  int64_t height, width;     // of the image, in pixels; multiples of the window
  int window_h, window_w;    // of a window, in pixels
  int64_t shift_h, shift_w;  // in [0, height), [0, width)

  SR_HOST_DEVICE int64_t windows_h() const { return height / window_h; }
  SR_HOST_DEVICE int64_t windows_w() const { return width / window_w; }
  SR_HOST_DEVICE int tokens() const { return window_h * window_w; }

  // The image row of row r of the windows in window row a. Both shift and position are below
  // height: one subtraction is the modulus.
  SR_HOST_DEVICE int64_t source_row(int64_t a, int r) const {
    const int64_t h = a * window_h + r + shift_h;
    return h >= height ? h - height : h;
  }
  SR_HOST_DEVICE int64_t source_column(int64_t b, int c) const {
    const int64_t w = b * window_w + c + shift_w;
    return w >= width ? w - width : w;
  }

  // Which sides of the image row r and column c came from: the roll moved them around or not.
  SR_HOST_DEVICE bool row_wrapped(int64_t a, int r) const {
    return a * window_h + r + shift_h >= height;
  }
  SR_HOST_DEVICE bool column_wrapped(int64_t b, int c) const {
    return b * window_w + c + shift_w >= width;
  }
  // Under Swin's shift mask two tokens see each other if their regions (0..3) are equal. A negative
  // shift is height + shift here, which swaps "wrapped" and "not wrapped": equality is unaffected.
  SR_HOST_DEVICE int region(int64_t a, int64_t b, int token) const {
    return (row_wrapped(a, token / window_w) ? 2 : 0) +
           (column_wrapped(b, token % window_w) ? 1 : 0);
  }
  // Whether a window has tokens of more than one region: only then is there anything to mask.
  SR_HOST_DEVICE bool is_divided(int64_t a, int64_t b) const {
    return row_wrapped(a, 0) != row_wrapped(a, window_h - 1) ||
           column_wrapped(b, 0) != column_wrapped(b, window_w - 1);
  }

  // Rows of the relative position bias table, and the row of a pair of tokens.
  SR_HOST_DEVICE int64_t bias_rows() const {
    return (2 * static_cast<int64_t>(window_h) - 1) * (2 * window_w - 1);
  }
  SR_HOST_DEVICE int64_t bias_row(int query, int key) const {
    return int64_t{bias_position(query)} - bias_position(key) + bias_centre();
  }
  // Its parts: bias_row(query, key) = bias_position(query) - bias_position(key) + bias_centre().
  SR_HOST_DEVICE int bias_position(int token) const {
    return token / window_w * (2 * window_w - 1) + token % window_w;
  }
  SR_HOST_DEVICE int bias_centre() const {
    return (window_h - 1) * (2 * window_w - 1) + window_w - 1;
  }
};

// height and width must be positive multiples of the window; the shift is any integer.
SR_HOST_DEVICE WindowGeometry make_window_geometry(int64_t height, int64_t width, int window_h,
                                                   int window_w, int64_t shift_h, int64_t shift_w) {
  return {height,
          width,
          window_h,
          window_w,
          (shift_h % height + height) % height,
          (shift_w % width + width) % width};
}

}  // namespace sr_kernels
