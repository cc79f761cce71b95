// Starts a kernel. The one place that knows how, on a GPU and in tests/cuda_on_cpu.
#pragma once

#include "common/ptx.cuh"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

// The first error of a sequence of launches; those behind it are left out.
#define SR_KERNELS_RETURN_IF_ERROR(expression)                            \
  do {                                                                    \
    if (const char* error = (expression); error != nullptr) return error; \
  } while (false)

namespace sr_kernels {

// Blocks that a grid's y and z dimension can have, and its x.
constexpr int64_t kMaxGridYZ = 65535;
constexpr int64_t kMaxGridX = 0x7fffffff;

// function(E{}) for the element type E of `kind`; returns an error text, nullptr for success.
template <typename Function>
const char* for_kind(ScalarKind kind, const Function& function) {
  switch (kind) {
    case ScalarKind::kFloat32:
      return function(float{});
    case ScalarKind::kFloat16:
      return function(__half{});
    case ScalarKind::kBFloat16:
      return function(__nv_bfloat16{});
    case ScalarKind::kFloat64:
      break;
  }
  return "CUDA kernels take float32, float16 and bfloat16";
}

#if defined(__CUDACC__)
// Beyond 48 KiB a kernel must ask, and the answer is the kernel's, not the launch's: all ask for
// the same, so that launches of different sizes from several threads do not undo one another.
template <typename... Formal>
const char* allow_shared_bytes(void (*kernel)(Formal...), int shared_bytes) {
  if (shared_bytes <= 48 * 1024) return nullptr;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSharedBytes);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // an error that is reported here is not left for the next caller
  return cudaGetErrorString(error);
}
#endif

// Starts kernel(params...) on `stream` (a cudaStream_t). Returns an error text, nullptr for
// success.
template <typename... Formal, typename... Params>
const char* launch_kernel(void (*kernel)(Formal...), dim3 grid, int threads, int shared_bytes,
                          void* stream, const Params&... params) {
#if defined(__CUDACC__)
  SR_KERNELS_RETURN_IF_ERROR(allow_shared_bytes(kernel, shared_bytes));
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#else
  (void)stream;
  cuda_on_cpu::launch(kernel, grid, threads, shared_bytes, params...);
  return nullptr;
#endif
}

}  // namespace sr_kernels
