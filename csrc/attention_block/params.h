// What the attention block's kernel sees. No torch here.
#pragma once

#include "common/platform.h"
#include "common/window_geometry.h"

namespace sr_kernels {

// y = W_out a + b_out + x, where a is, per channel group g and window, softmax(q q^T) v.
struct AttentionBlockParams {
  ScalarKind kind;
  int64_t batch, channels, height, width;
  int64_t groups;  // of channels / groups channels, one geometry each
  const WindowGeometry* geometry;
  // Dense, row-major. W_in is (2 channels, channels), its rows q0 v0 q1 v1 ...; (channels,
  // channels) and v alone where q is given. Biases may be nullptr.
  const void *w_in, *b_in, *w_out, *b_out;
  FeatureMap x;
  // batch * channels * height * width elements in an order of the kernel's own, for a later call:
  // read if reuse is set, else written unless nullptr.
  void* q;
  bool reuse;
  FeatureMap y;  // holds a meanwhile: must not overlap x
};

SR_KERNELS_DECLARE_FOR_EACH_ISA(void attention_block(const AttentionBlockParams& params,
                                                     ParallelFor parallel);)

}  // namespace sr_kernels
