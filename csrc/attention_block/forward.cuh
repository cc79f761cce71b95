// The attention block on CUDA, inference only: y = W_out a + b_out + x, where a is, per channel
// group g and window, softmax(q_g q_g^T) v_g, and q and v are projections of x.
//
// First form: a sequence of launches, not one kernel. The projection (shift_conv's conv_kernel
// without a shift) writes q and v to a workspace, window attention a, and a second convolution adds
// bias and residual. What a later call reuses is q alone, (N, H, W, C) with the groups in order,
// which copy_queries_kernel takes out of q and v.
//
// Tile: those of the kernels that it runs; all maps between them are channels_last.
//
// Floor, per pixel, C channels, G groups of t_g tokens a window, e bytes an element: 3 e C bytes
// (x, y, q; reuse the same), 2 C (3 C) + 4 (C / G) sum t_g FLOP (2 C (2 C) + ... in reuse), sum t_g
// exponentials. Here 9 e C more bytes (7 e C in reuse) go through the workspace and come back.
// Measured fraction: unmeasured, never run on a GPU.
#pragma once

#include "attention_block/params.h"
#include "common/launch.cuh"
#include "shift_conv/forward.cuh"

namespace sr_kernels {

// q[p][g d + i] = qv[p][2 g d + i], a thread for each element.
template <typename E>
__global__ void __launch_bounds__(kBlockThreads)
    copy_queries_kernel(const E* qv, E* q, int64_t count, int channels, int d) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t pixel = i / channels;
  const int c = static_cast<int>(i % channels);
  store_global<E>(q + i, load_global<E>(qv + pixel * 2 * channels + c + c / d * d));
}

}  // namespace sr_kernels
