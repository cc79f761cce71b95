// What the linear attention block's kernel sees. No torch here.
#pragma once

#include "common/platform.h"
#include "common/window_geometry.h"

namespace sr_kernels {

// u = x + W1 depthwise(W0 x + b0) + b1 in the rolled image; q, k, v = W_qkv u + b_qkv;
// y = u + W_out (scale q (softmax_tokens(k)^T v)) + b_out in each window, per head.
struct LinearAttentionParams {
  ScalarKind kind;
  int64_t batch, channels, num_heads;
  WindowGeometry geometry;
  double scale;
  // Dense, row-major: (channels, channels), w_depth (channels, 3, 3), w_qkv (3 channels, channels).
  // Biases may be nullptr.
  const void *w0, *b0, *w_depth, *w1, *b1, *w_qkv, *b_qkv, *w_out, *b_out;
  FeatureMap x, y;  // y overlaps none of the others
};

SR_KERNELS_DECLARE_FOR_EACH_ISA(void linear_attention_block(const LinearAttentionParams& params,
                                                            ParallelFor parallel);)

}  // namespace sr_kernels
