// Shift convolution on CUDA, forward: y = act(W shift(x) + b) (+ residual).
//
// Tile: one thread computes kOutputs output channels of one pixel; neighbouring threads are
// neighbouring pixels, so that an NCHW read is coalesced, shifted or not, and a weight is the same
// address for a whole warp. No shared memory, no tensor cores: this is the plain form that the
// build, the ABI and the argument path are proven with.
//
// Floor: each input and output element once, (c_in + c_out) * element size bytes a pixel. x is read
// c_out / kOutputs times here, from L2. Measured fraction: unmeasured; never run on a GPU yet, and
// therefore not offered by sr_kernels.backends.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "shift_conv/params.h"

namespace sr_kernels {

constexpr int kOutputs = 8;

SR_HOST_DEVICE float to_float(float x) { return x; }
SR_HOST_DEVICE float to_float(__half x) { return __half2float(x); }
SR_HOST_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
SR_HOST_DEVICE void from_float(float x, float* out) { *out = x; }
SR_HOST_DEVICE void from_float(float x, __half* out) { *out = __float2half_rn(x); }
SR_HOST_DEVICE void from_float(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }

// Output channels [first_output, first_output + kOutputs) of the pixel-th pixel of the batch.
template <typename S>
SR_HOST_DEVICE void shift_conv2d_pixel(const ShiftConvParams& p, int64_t pixel,
                                       int64_t first_output) {
  const int64_t w = pixel % p.width, h = pixel / p.width % p.height;
  const int64_t n = pixel / (p.width * p.height);
  const S* weight = static_cast<const S*>(p.weight) + first_output * p.c_in;
  const S* bias = static_cast<const S*>(p.bias);
  const int64_t outputs =
      p.c_out - first_output < kOutputs ? p.c_out - first_output : int64_t(kOutputs);

  float sum[kOutputs] = {};
  for (int64_t c = 0; c < p.c_in; ++c) {
    const ShiftOffset offset =
        shift_offset(p.pattern, static_cast<int>(c), static_cast<int>(p.c_in), p.groups);
    const int64_t row = h + offset.dy, column = w + offset.dx;
    if (row < 0 || row >= p.height || column < 0 || column >= p.width) continue;
    const float x =
        to_float(static_cast<const S*>(p.x.data)[n * p.x.stride_n + c * p.x.stride_c +
                                                 row * p.x.stride_h + column * p.x.stride_w]);
    for (int i = 0; i < kOutputs; ++i)
      if (i < outputs) sum[i] += to_float(weight[i * p.c_in + c]) * x;
  }
  for (int i = 0; i < kOutputs; ++i) {
    if (i >= outputs) break;
    const int64_t c = first_output + i;
    float y = sum[i] + (bias != nullptr ? to_float(bias[c]) : 0.0f);
    y = activate(p.activation, y, static_cast<float>(p.negative_slope));
    if (p.residual.data != nullptr)
      y += to_float(static_cast<const S*>(
          p.residual.data)[n * p.residual.stride_n + c * p.residual.stride_c +
                           h * p.residual.stride_h + w * p.residual.stride_w]);
    from_float(y, static_cast<S*>(p.y.data) + n * p.y.stride_n + c * p.y.stride_c +
                      h * p.y.stride_h + w * p.y.stride_w);
  }
}

#if defined(__CUDACC__)
constexpr int kThreads = 256;

template <typename S>
__global__ void __launch_bounds__(kThreads) shift_conv2d_kernel(ShiftConvParams p) {
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (pixel >= p.batch * p.height * p.width) return;
  shift_conv2d_pixel<S>(p, pixel, static_cast<int64_t>(blockIdx.y) * kOutputs);
}
#endif

}  // namespace sr_kernels
