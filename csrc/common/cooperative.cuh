// A kernel whose blocks are all on the GPU at once, so that they can wait for each other.
#pragma once

#include "common/launch.cuh"

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#endif

namespace sr_kernels {

// A barrier of all threads of all blocks, of a kernel that launch_cooperative started: what any of
// them wrote to global memory before is there for all of them afterwards. Its counter is the
// driver's, who keeps launches in other streams and replays of a graph apart: one of ours would
// have to be zeroed each time, which is a launch more.
#if defined(__CUDACC__)
SR_DEVICE void sync_grid() { cooperative_groups::this_grid().sync(); }
#else
SR_DEVICE void sync_grid(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_cpu::block->sync_grid(file, line);
}
#endif

// The current device's multiprocessors; 0 where it has no such launches. An error is left to the
// launch that follows, which meets it, too.
inline int cooperative_multiprocessors() {
#if defined(__CUDACC__)
  int device = 0, able = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&able, cudaDevAttrCooperativeLaunch, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return able == 0 ? 0 : count;
#else
  ++cuda_on_cpu::device.questions;
  return cuda_on_cpu::device.multiprocessors;
#endif
}

// Blocks of the kernel that a multiprocessor of the current device holds at once; 0 after an error,
// as above.
template <typename Params>
int resident_blocks(void (*kernel)(Params), int threads, int shared_bytes) {
#if defined(__CUDACC__)
  int blocks = 0;
  if (allow_shared_bytes(kernel, shared_bytes) != nullptr) return 0;
  if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &blocks, kernel, threads, static_cast<size_t>(shared_bytes)) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return blocks;
#else
  (void)kernel;
  return cuda_on_cpu::resident_blocks(threads, shared_bytes);
#endif
}

// What launch_cooperative returns, this very pointer, where the driver refuses a launch that should
// have fitted: of a GPU that is shared (MPS, green contexts) a process may have fewer
// multiprocessors than it is told. Nothing has run then, and no error is left behind: the caller
// takes kernels whose blocks do not wait for each other.
inline constexpr char kGridRefused[] = "the GPU refuses to start all blocks of a kernel at once";

// Every other error is one.
inline bool refuses_grid(cudaError_t error) {
  return error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorNotSupported;
}

// Starts kernel(params) on `stream`, all of its blocks at once: no more than resident_blocks of
// every multiprocessor, or the driver refuses. A stream's capture takes it as any other kernel.
// Returns an error text, kGridRefused or another, nullptr for success.
template <typename Params>
const char* launch_cooperative(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes,
                               void* stream, const Params& params) {
#if defined(__CUDACC__)
  SR_KERNELS_RETURN_IF_ERROR(allow_shared_bytes(kernel, shared_bytes));
  void* arguments[] = {const_cast<Params*>(&params)};
  const cudaError_t error = cudaLaunchCooperativeKernel(
      reinterpret_cast<const void*>(kernel), grid, dim3(static_cast<unsigned>(threads)), arguments,
      static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here, not left for the next caller
  return refuses_grid(error) ? kGridRefused : cudaGetErrorString(error);
#else
  (void)stream;
  const cudaError_t error =
      cuda_on_cpu::launch_cooperative(kernel, grid, threads, shared_bytes, params);
  if (error == cudaSuccess) return nullptr;
  return refuses_grid(error) ? kGridRefused : "an error of the emulated driver";
#endif
}

}  // namespace sr_kernels
