#include "shift_conv/launch.h"

#include <cuda_runtime.h>

#include "shift_conv/forward.cuh"

namespace sr_kernels {
namespace {

template <typename S>
const char* launch(const ShiftConvParams& p, cudaStream_t stream) {
  const int64_t blocks = (p.batch * p.height * p.width + kThreads - 1) / kThreads;
  const int64_t slices = (p.c_out + kOutputs - 1) / kOutputs;
  if (blocks > 0x7fffffffLL || slices > 65535) return "the image or c_out is too large for a grid";
  shift_conv2d_kernel<S>
      <<<dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(slices)), kThreads, 0, stream>>>(
          p);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_shift_conv2d(const ShiftConvParams& params, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (params.kind) {
    case ScalarKind::kFloat32:
      return launch<float>(params, cuda_stream);
    case ScalarKind::kFloat16:
      return launch<__half>(params, cuda_stream);
    case ScalarKind::kBFloat16:
      return launch<__nv_bfloat16>(params, cuda_stream);
    case ScalarKind::kFloat64:
      break;
  }
  return "CUDA kernels take float32, float16 and bfloat16";
}

}  // namespace sr_kernels
