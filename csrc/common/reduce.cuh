// Sums and maxima over a warp or a block, in one fixed order: the same bits every time.
#pragma once

#include "common/ptx.cuh"

namespace sr_kernels {

// Every lane gets the result.
SR_DEVICE float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  return x;
}
// NaN, if any lane has one.
SR_DEVICE float warp_maximum(float x) {
  for (int step = 16; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(kFullWarp, x, step);
    x = other > x || other != other ? other : x;
  }
  return x;
}

// Every thread gets the sum. partial: a shared array of (threads / 32) floats, free before and
// after; two barriers.
SR_DEVICE float block_sum(float x, float* partial, int thread, int threads) {
  x = warp_sum(x);
  if (thread % 32 == 0) store_shared<float>(partial + thread / 32, x);
  __syncthreads();
  float sum = 0.0f;
  for (int i = 0; i < threads / 32; ++i) sum += load_shared<float>(partial + i);
  __syncthreads();
  return sum;
}

}  // namespace sr_kernels
