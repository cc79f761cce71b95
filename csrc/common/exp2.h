// 2^f, which exponentials with a range reduction of their own are made of. Internal linkage, as
// simd.h.
#pragma once

#include "common/simd.h"

namespace sr_kernels {
namespace SR_KERNELS_ISA {
namespace {

// 2^f for |f| <= 1/2: a minimax polynomial of degree 6, below 1 ulp.
SR_INLINE Vec<float> exp2_of_fraction(Vec<float> f) {
  Vec<float> p = broadcast(1.5461444698569e-4f);
  p = p * f + 1.3400428177615838e-3f;
  p = p * f + 9.618056678524637e-3f;
  p = p * f + 5.550327226670302e-2f;
  p = p * f + 2.4022650922288757e-1f;
  p = p * f + 6.931472067028326e-1f;
  return p * f + 1.0f;
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

// x * sigmoid(z) as one division, x / (1 + exp(-z)). exp(-z) is infinite from z = -88.4 down, where
// float32 can hardly hold it, and a NaN passes.
SR_INLINE Vec<float> times_sigmoid(Vec<float> x, Vec<float> z) {
  const Vec<float> a = clamp(z, broadcast(-89.0f), broadcast(88.0f));
  const Vec<float> magic = broadcast(12582912.0f);               // 1.5 * 2^23
  const Vec<float> shifted = a * -1.44269504088896341f + magic;  // rounds to an integer n
  const Vec<float> f = a * -1.44269504088896341f - (shifted - magic);
  IntVec n;
  std::memcpy(&n, &shifted, sizeof(n));
  // -127 <= n <= 128: the lowest and the highest exponent there are, which are 0 and infinity.
  const IntVec power_bits = (n - (0x4b400000 - 127)) << 23;
  Vec<float> power;
  std::memcpy(&power, &power_bits, sizeof(power));
  return x / (exp2_of_fraction(f) * power + 1.0f);
}
SR_INLINE Vec<double> times_sigmoid(Vec<double> x, Vec<double> z) { return x * sigmoid(z); }

}  // namespace
}  // namespace SR_KERNELS_ISA
}  // namespace sr_kernels
