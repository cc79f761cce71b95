// What the window attention kernels see. No torch here.
#pragma once

#include "common/platform.h"
#include "common/window_geometry.h"

namespace sr_kernels {

// out = softmax(scale q k^T + bias) v inside every window, per head. Head m owns channels
// [m * d_qk, (m + 1) * d_qk) of q and k and [m * d_v, (m + 1) * d_v) of v and out.
struct WindowAttentionParams {
  ScalarKind kind;
  int64_t batch;
  int64_t num_heads, d_qk, d_v;
  WindowGeometry geometry;
  bool mask;  // Swin's shift mask; false: windows wrap around the image
  double scale;
  FeatureMap q, k, v;  // k.data nullptr: the keys are the queries
  const void* bias;    // (geometry.bias_rows(), num_heads) dense, or nullptr
  FeatureMap out;
  // Log-sum-exp of each score row at the pixel of its query, (batch, num_heads, height, width),
  // float32 (float64 for float64 maps): written by the forward unless nullptr; what a reuse of the
  // scores and the backward may read.
  FeatureMap lse;
};

struct WindowAttentionBackwardParams {
  // out: what the forward computed, which a kernel may read, or without data.
  WindowAttentionParams forward;
  FeatureMap grad;  // of out
  // data nullptr: not wanted. Where the keys are the queries dq holds both paths and dk is absent.
  FeatureMap dq, dk, dv;
  void* dbias;  // as bias, in the dtype of q
  // Another use of the same scores, or no data: its values, what it computed from them and the
  // gradient of that. What flows through its scores joins dq and dk. Shaped as v, out and grad; CPU
  // kernels alone read them.
  FeatureMap reuse_v, reuse_out, reuse_grad;
};

// A call takes a list: one element for window_attention, one per channel group (with maps that
// start at the group's first channel) for grouped_window_attention.
SR_KERNELS_DECLARE_FOR_EACH_ISA(
    void window_attention(const WindowAttentionParams* groups, int64_t group_count,
                          ParallelFor parallel);
    void window_attention_backward(const WindowAttentionBackwardParams* groups, int64_t group_count,
                                   ParallelFor parallel);)

}  // namespace sr_kernels
