// What every kernel file needs to know about its compiler: CUDA or not, and which CPU
// instruction set this translation unit is compiled for. No torch, no standard containers here.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SR_HOST_DEVICE __host__ __device__ __forceinline__
#define SR_DEVICE __device__ __forceinline__
#else
#define SR_HOST_DEVICE inline __attribute__((always_inline))
#define SR_DEVICE inline  // CUDA kernels compiled by g++, for tests
#endif

// CPU kernels are compiled once per instruction set from one source. Each copy lives in a
// namespace of its own (SR_KERNELS_ISA) and, inside it, in an anonymous namespace: a template with
// external linkage would be emitted as a weak symbol, of which the linker keeps one copy for all,
// and the AVX-512 copy would then crash an older machine.
#define SR_KERNELS_DECLARE_FOR_EACH_ISA(...) \
  namespace portable {                       \
  __VA_ARGS__;                               \
  }                                          \
  namespace avx2 {                           \
  __VA_ARGS__;                               \
  }                                          \
  namespace avx512 {                         \
  __VA_ARGS__;                               \
  }

namespace sr_kernels {

// Element types that tensors may have. float16 and bfloat16 are storage only: arithmetic on them
// is done in float32; float64 is computed in float64.
enum class ScalarKind : int { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

// Torch's thread pool, seen from code that knows no torch: run body(begin, end, context) over
// [0, count), split in any way.
using ParallelFor = void (*)(int64_t count, void (*body)(int64_t begin, int64_t end, void* context),
                             void* context);

// A batch of feature maps: element (n, c, h, w) is data[n*stride_n + c*stride_c + h*stride_h +
// w*stride_w], strides in elements. data is nullptr where an optional tensor is absent.
struct FeatureMap {
  void* data = nullptr;
  int64_t stride_n = 0, stride_c = 0, stride_h = 0, stride_w = 0;
};

}  // namespace sr_kernels
