// What the shift convolution kernels see. No torch here.
#pragma once

#include "common/activation.h"
#include "common/platform.h"
#include "common/shift_pattern.h"

namespace sr_kernels {

// y = act(W shift(x) + b) (+ residual)
struct ShiftConvParams {
  ScalarKind kind;
  int64_t batch, height, width, c_in, c_out;
  ShiftPattern pattern;
  int groups;
  Activation activation;
  double negative_slope;
  FeatureMap x, residual;     // residual.data may be nullptr
  const void *weight, *bias;  // weight (c_out, c_in) dense; bias (c_out) or nullptr
  FeatureMap y;
};

struct ShiftConvBackwardParams {
  ShiftConvParams forward;  // y and residual unused
  FeatureMap grad;          // of y
  FeatureMap dx;            // data nullptr: not wanted, likewise below
  void *dweight, *dbias;    // dense, in the dtype of x
};

// y = W1 shift(act(W0 shift(x) + b0)) + b1 (+ x)
struct ShiftConvBlockParams {
  ScalarKind kind;
  int64_t batch, height, width, c_in, c_hidden, c_out;
  ShiftPattern pattern;
  int groups;
  Activation activation;
  double negative_slope;
  bool residual;
  FeatureMap x;
  const void *w0, *b0, *w1, *b1;  // dense; b0, b1 may be nullptr
  FeatureMap y;
};

struct ShiftConvBlockBackwardParams {
  ShiftConvBlockParams forward;  // y unused
  FeatureMap grad, dx;
  void *dw0, *db0, *dw1, *db1;  // nullptr: not wanted
};

SR_KERNELS_DECLARE_FOR_EACH_ISA(
    void shift_conv2d(const ShiftConvParams& params, ParallelFor parallel);
    void shift_conv2d_backward(const ShiftConvBackwardParams& params, ParallelFor parallel);
    void shift_conv_block(const ShiftConvBlockParams& params, ParallelFor parallel);
    void shift_conv_block_backward(const ShiftConvBlockBackwardParams& params,
                                   ParallelFor parallel);)

}  // namespace sr_kernels
