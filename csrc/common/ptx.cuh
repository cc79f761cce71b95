// Everything that a kernel needs and plain C++ lacks, each once: the instruction for the GPU, and
// what tests/cuda_on_cpu runs in its place where the compiler is not nvcc. All inline PTX is here.
#pragma once

#include "common/platform.h"

#if !defined(__CUDACC__)
#include "cuda_on_cpu.h"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <limits>

namespace sr_kernels {

constexpr uint32_t kFullWarp = 0xffffffffu;

// ------------------------------------------------------------------ memory

// Dynamic shared memory that a block can have, in bytes: what sm_86, sm_89 and sm_120 allow, the
// least from sm_80 on. No tile is larger, so that every kernel starts on all of them.
constexpr int kMaxSharedBytes = 99 * 1024;

// `count` elements of the block's dynamic shared memory, from byte_offset on (a multiple of 16).
// What is behind the pointer is touched with the functions below only.
template <typename T>
SR_DEVICE T* shared_array(int byte_offset, int count) {
#if defined(__CUDACC__)
  extern __shared__ __align__(128) unsigned char sr_kernels_shared[];
  return reinterpret_cast<T*>(sr_kernels_shared + byte_offset);
#else
  return static_cast<T*>(
      cuda_on_cpu::block->declare(byte_offset, static_cast<int64_t>(count) * sizeof(T)));
#endif
}

// V is the element or a vector of up to 16 bytes of them, at an address that is a multiple of its
// size.
template <typename V>
SR_DEVICE V load_shared(const void* from) {
#if defined(__CUDACC__)
  __builtin_assume(__isShared(from));
  return *static_cast<const V*>(from);
#else
  V value;
  cuda_on_cpu::block->read(from, &value, sizeof(V));
  return value;
#endif
}
template <typename V>
SR_DEVICE void store_shared(void* to, V value) {
#if defined(__CUDACC__)
  __builtin_assume(__isShared(to));
  *static_cast<V*>(to) = value;
#else
  cuda_on_cpu::block->write(to, &value, sizeof(V));
#endif
}
template <typename V>
SR_DEVICE V load_global(const void* from) {
#if defined(__CUDACC__)
  __builtin_assume(__isGlobal(from));
#else
  cuda_on_cpu::block->check_global(from, sizeof(V), "read");
#endif
  return *static_cast<const V*>(from);
}
template <typename V>
SR_DEVICE void store_global(void* to, V value) {
#if defined(__CUDACC__)
  __builtin_assume(__isGlobal(to));
#else
  cuda_on_cpu::block->check_global(to, sizeof(V), "write");
#endif
  *static_cast<V*>(to) = value;
}

#if defined(__CUDACC__)
SR_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// ------------------------------------------------------------------ asynchronous copies

// kBytes (4, 8, 16) from global to shared memory, zeros where not `valid` (from is not read then).
// They are there after copy_async_wait() of the thread that copied and a barrier for everyone else.
template <int kBytes>
SR_DEVICE void copy_async(void* to, const void* from, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
#if defined(__CUDACC__)
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(shared_address(to)),
                 "l"(from), "n"(kBytes), "r"(bytes)
                 : "memory");
#else
  cuda_on_cpu::block->copy_async(to, from, kBytes, valid);
#endif
}
SR_DEVICE void copy_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#else
  cuda_on_cpu::block->commit();
#endif
}
// Waits until at most kOnTheirWay of this thread's committed groups are not there yet.
template <int kOnTheirWay>
SR_DEVICE void copy_async_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kOnTheirWay) : "memory");
#else
  cuda_on_cpu::block->wait_for_copies(kOnTheirWay);
#endif
}

// ------------------------------------------------------------------ matrices

// ldmatrix: kMatrices of 8x8 elements of 16 bits. Lane 8 i + r brings the address of row r of
// matrix i; with fewer than four matrices, the addresses of the remaining lanes are not used.
// Register i of lane l gets elements 2 (l % 4) and + 1 of row l / 4 of matrix i; transposed, of its
// column l / 4.
template <bool kTransposed>
SR_DEVICE void load_matrix(uint32_t (&registers)[4], const void* row) {
#if defined(__CUDACC__)
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(shared_address(row))
                 : "memory");
#else
  cuda_on_cpu::load_matrix(registers, row, kTransposed, __LINE__);
#endif
}
template <bool kTransposed>
SR_DEVICE void load_matrix(uint32_t (&registers)[2], const void* row) {
#if defined(__CUDACC__)
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(shared_address(row))
                 : "memory");
#else
  cuda_on_cpu::load_matrix(registers, row, kTransposed, __LINE__);
#endif
}

// d += a b, mma.sync m16n8k16 with float32 sums; E is __half or __nv_bfloat16. Which lane holds
// what: mma.cuh.
template <typename E>
SR_DEVICE void matrix_multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#if defined(__CUDACC__)
#define SR_KERNELS_DEFINE_MMA(E, name)                                                    \
  template <>                                                                             \
  SR_DEVICE void matrix_multiply_add<E>(float (&d)[4], const uint32_t (&a)[4],            \
                                        const uint32_t (&b)[2]) {                         \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                   \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));     \
  }
#else
#define SR_KERNELS_DEFINE_MMA(E, name)                                         \
  template <>                                                                  \
  SR_DEVICE void matrix_multiply_add<E>(float (&d)[4], const uint32_t (&a)[4], \
                                        const uint32_t (&b)[2]) {              \
    cuda_on_cpu::matrix_multiply_add<E>(d, a, b, __LINE__);                    \
  }
#endif
SR_KERNELS_DEFINE_MMA(__half, "f16")
SR_KERNELS_DEFINE_MMA(__nv_bfloat16, "bf16")
#undef SR_KERNELS_DEFINE_MMA

// ------------------------------------------------------------------ arithmetic

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// b where it is larger than a: a NaN in b is not taken.
SR_DEVICE float larger(float a, float b) { return b > a ? b : a; }

// 2^x with a relative error of about 2^-22; 0 for -inf, inf above 128, NaN passes.
SR_DEVICE float exp2_approximate(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// x, but nothing computed from it can be computed before this point: keeps loop invariants that are
// cheap to compute again from holding registers through a loop.
SR_DEVICE int opaque(int x) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// ------------------------------------------------------------------ elements

SR_HOST_DEVICE float to_float(float x) { return x; }
SR_HOST_DEVICE float to_float(__half x) { return __half2float(x); }
SR_HOST_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename E>
SR_HOST_DEVICE E from_float(float x);
template <>
SR_HOST_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
SR_HOST_DEVICE __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
SR_HOST_DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Two elements as a matrix fragment holds them, the first in the low half.
template <typename E>
SR_DEVICE uint32_t pack_pair(float low, float high);
template <>
SR_DEVICE uint32_t pack_pair<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
template <>
SR_DEVICE uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

// kCount elements moved as one.
template <typename E, int kCount>
struct alignas(sizeof(E) * kCount) Vector {
  E element[kCount];
};

}  // namespace sr_kernels
