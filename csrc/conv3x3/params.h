// What the 3x3 convolution's kernel sees. No torch here.
#pragma once

#include "common/activation.h"
#include "common/platform.h"

namespace sr_kernels {

// y = act(conv2d(x, weight, padding=1) + bias + skip)
struct Conv3x3Params {
  ScalarKind kind;
  int64_t batch, height, width, c_in, c_out;
  Activation activation;
  double negative_slope;
  FeatureMap x, skip;  // skip.data may be nullptr
  FeatureMap weight;   // n: output channel, c: input channel
  const void* bias;    // (c_out) or nullptr
  FeatureMap y;        // overlaps none of the others
};

SR_KERNELS_DECLARE_FOR_EACH_ISA(void conv3x3(const Conv3x3Params& params, ParallelFor parallel);)

}  // namespace sr_kernels
