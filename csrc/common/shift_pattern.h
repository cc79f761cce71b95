// The shift of a shift convolution, as index arithmetic. One definition for CPU, CUDA and tests.
//
//   shift(x)[c, h, w] = x[c, h + dy(c), w + dx(c)], zero outside the image
//
// g = channels / groups. Channel group 0..3 (g channels each) moves, the remaining channels stay:
//
//   pattern   group 0    group 1    group 2    group 3     rest
//   plus      ( 0, +1)   ( 0, -1)   (+1,  0)   (-1,  0)   (0, 0)      (dy, dx)
//   cross     (-1, -1)   (-1, +1)   (+1, -1)   (+1, +1)   (0, 0)
//   none      ( 0,  0)   ( 0,  0)   ( 0,  0)   ( 0,  0)   (0, 0)      a plain 1x1 convolution
//
// Source: ELAN (Zhang et al., ECCV 2022); cross is FriedRiceLab's diagonal
// `ShiftConv2d1x1(shift_mode="x")`, in its channel order.
#pragma once

#include "common/platform.h"

namespace sr_kernels {

enum class ShiftPattern : int { kPlus = 0, kCross = 1, kNone = 2 };

struct ShiftOffset {
  int dy, dx;
};

SR_HOST_DEVICE int shift_group(int channel, int channels, int groups) {
  const int size = channels / groups;  // 0 where there are fewer channels than groups: none moves
  return (channel >= size) + (channel >= 2 * size) + (channel >= 3 * size) + (channel >= 4 * size);
}

SR_HOST_DEVICE ShiftOffset shift_offset_of_group(ShiftPattern pattern, int group) {
  if (group >= 4 || pattern == ShiftPattern::kNone) return {0, 0};
  const int sign_first = group < 2 ? 1 : -1;
  const int sign_second = (group & 1) == 0 ? 1 : -1;
  if (pattern == ShiftPattern::kCross) return {-sign_first, -sign_second};
  return group < 2 ? ShiftOffset{0, sign_second} : ShiftOffset{sign_second, 0};
}

SR_HOST_DEVICE ShiftOffset shift_offset(ShiftPattern pattern, int channel, int channels,
                                        int groups) {
  return shift_offset_of_group(pattern, shift_group(channel, channels, groups));
}

}  // namespace sr_kernels
