// 2^f, which exponentials with a range reduction of their own are made of. Internal linkage, as
// simd.h.
#pragma once

#include "common/simd.h"

namespace sr_kernels {
namespace SR_KERNELS_ISA {
namespace {

// f[i] <- 2^f[i] for |f| <= 1/2, step by step: a minimax polynomial of degree 6, below 1 ulp.
template <int N>
SR_INLINE void exp2_of_fractions(Vec<float> (&f)[N]) {
  constexpr float kCoefficients[] = {1.3400428177615838e-3f, 9.618056678524637e-3f,
                                     5.550327226670302e-2f,  2.4022650922288757e-1f,
                                     6.931472067028326e-1f,  1.0f};
  Vec<float> p[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) p[i] = broadcast(1.5461444698569e-4f);
#pragma GCC unroll 8
  for (int k = 0; k < 6; ++k)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) p[i] = p[i] * f[i] + kCoefficients[k];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) f[i] = p[i];
}
SR_INLINE Vec<float> exp2_of_fraction(Vec<float> f) {
  Vec<float> result[1] = {f};
  exp2_of_fractions(result);
  return result[0];
}

// v between low and high, or a NaN that v is. Two instructions, which g++ does not make of the
// comparisons.
SR_INLINE Vec<float> clamp(Vec<float> v, Vec<float> low, Vec<float> high) {
#if defined(__AVX512F__)
  return _mm512_maskz_min_ps(0xffff, high, _mm512_maskz_max_ps(0xffff, low, v));
#elif defined(__AVX2__)
  return _mm256_min_ps(high, _mm256_max_ps(low, v));
#else
  v = v < low ? low : v;
  return v > high ? high : v;
#endif
}

// z[i] <- x[i] * sigmoid(z[i]) as one division, x / (1 + exp(-z)). exp(-z) is infinite from
// z = -88.4 down, where float32 can hardly hold it, and a NaN passes. N vectors step by step: one
// after the other, their chains of dependent operations would fill the processor's queues.
template <int N>
SR_INLINE void times_sigmoids(const Vec<float> (&x)[N], Vec<float> (&z)[N]) {
  const Vec<float> magic = broadcast(12582912.0f);  // 1.5 * 2^23
  Vec<float> shifted[N], f[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    const Vec<float> a = clamp(z[i], broadcast(-89.0f), broadcast(88.0f));
    shifted[i] = a * -1.44269504088896341f + magic;  // rounds to an integer n
    f[i] = a * -1.44269504088896341f - (shifted[i] - magic);
  }
  exp2_of_fractions(f);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    IntVec n;
    std::memcpy(&n, &shifted[i], sizeof(n));
    // -127 <= n <= 128: the lowest and the highest exponent there are, which are 0 and infinity.
    const IntVec power_bits = (n - (0x4b400000 - 127)) << 23;
    Vec<float> power;
    std::memcpy(&power, &power_bits, sizeof(power));
    z[i] = x[i] / (f[i] * power + 1.0f);
  }
}
template <int N>
SR_INLINE void times_sigmoids(const Vec<double> (&x)[N], Vec<double> (&z)[N]) {
  for (int i = 0; i < N; ++i) z[i] = x[i] * sigmoid(z[i]);
}
// x * sigmoid(z)
template <typename V>
SR_INLINE V times_sigmoid(V x, V z) {
  const V factor[1] = {x};
  V result[1] = {z};
  times_sigmoids(factor, result);
  return result[0];
}

}  // namespace
}  // namespace SR_KERNELS_ISA
}  // namespace sr_kernels
