// What the attention gate kernels see. No torch here.
//
// Weights, biases and their gradients are dense, in the dtype of x; an absent bias is nullptr. In a
// backward struct a gradient whose pointer is nullptr is not wanted. A workspace is uninitialised
// memory of compute elements (float64 for float64 tensors, float32 for all others).
#pragma once

#include "common/platform.h"

namespace sr_kernels {

// y = x * sigmoid(W x + b)
struct PixelAttentionParams {
  ScalarKind kind;
  int64_t batch, height, width, channels;
  FeatureMap x;
  const void *weight, *bias;  // (C, C), (C)
  FeatureMap y;
};

struct PixelAttentionBackwardParams {
  PixelAttentionParams forward;  // y unused
  FeatureMap grad, dx;
  void *dweight, *dbias;
};

// With u = x * sigmoid(W_p x + b_p), or u = x where pixel_weight is nullptr:
//   y = u * sigmoid(conv([max_c u, mean_c u]) + b)
struct SpatialAttentionParams {
  ScalarKind kind;
  int64_t batch, height, width, channels;
  int64_t kernel;  // the convolution's size, odd
  FeatureMap x;
  const void *pixel_weight, *pixel_bias;  // (C, C), (C)
  const void *weight, *bias;              // (2, kernel, kernel), (1)
  FeatureMap y;
  void* workspace;  // (N, kForwardPlanes or kBackwardPlanes, H, W), of the CPU kernels

  static constexpr int64_t kForwardPlanes = 2, kBackwardPlanes = 5;
};

struct SpatialAttentionBackwardParams {
  SpatialAttentionParams forward;  // y unused
  FeatureMap grad, dx;
  void *dpixel_weight, *dpixel_bias, *dweight, *dbias;
};

// gate = sigmoid(W_up relu(W_down z + b_down) + b_up), z the mean of x over its pixels, plus their
// population standard deviation if contrast. y = x * gate unless y.data is nullptr.
struct ChannelAttentionParams {
  ScalarKind kind;
  int64_t batch, height, width, channels, hidden;
  bool contrast;
  FeatureMap x;
  const void *w_down, *b_down, *w_up, *b_up;  // (hidden, C), (hidden), (C, hidden), (C)
  FeatureMap y;
  void* gate;  // (N, C) dense, or nullptr
};

// How the blocks of one launch keep all of x on chip: `share` pixels of an image each, which has
// `chunks` of them. 0 chunks: all blocks that a GPU holds at once cannot keep all images.
struct OnChipShares {
  int chunks, share, shared_bytes;
};

struct ChannelAttentionBackwardParams {
  ChannelAttentionParams forward;  // y and gate unused
  FeatureMap grad;                 // of y, (N, C, H, W), or of the gate, (N, C, 1, 1)
  bool grad_of_gate;
  FeatureMap dx;
  void *dw_down, *db_down, *dw_up, *db_up;
};

// y = W (gate * x) + b (+ residual)
struct GatedConvParams {
  ScalarKind kind;
  int64_t batch, height, width, c_in, c_out;
  FeatureMap x, residual;     // residual.data may be nullptr
  const void* gate;           // (N, c_in) dense
  const void *weight, *bias;  // (c_out, c_in), (c_out)
  FeatureMap y;
};

struct GatedConvBackwardParams {
  GatedConvParams forward;  // y, bias and residual unused
  FeatureMap grad, dx;
  void *dgate, *dweight, *dbias;  // dgate (N, c_in)
};

SR_KERNELS_DECLARE_FOR_EACH_ISA(
    void pixel_attention(const PixelAttentionParams& params, ParallelFor parallel);
    void pixel_attention_backward(const PixelAttentionBackwardParams& params, ParallelFor parallel);
    void spatial_attention(const SpatialAttentionParams& params, ParallelFor parallel);
    void spatial_attention_backward(const SpatialAttentionBackwardParams& params,
                                    ParallelFor parallel);
    void channel_attention(const ChannelAttentionParams& params, ParallelFor parallel);
    void channel_attention_backward(const ChannelAttentionBackwardParams& params,
                                    ParallelFor parallel);
    void gated_conv1x1(const GatedConvParams& params, ParallelFor parallel);
    void gated_conv1x1_backward(const GatedConvBackwardParams& params, ParallelFor parallel);)

}  // namespace sr_kernels
