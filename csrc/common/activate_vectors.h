// The formulas of activation.h on vectors: exp and erf of the standard library are scalar. Internal
// linkage, as simd.h.
#pragma once

#include "common/activation.h"
#include "common/simd.h"

namespace sr_kernels {
namespace SR_KERNELS_ISA {
namespace {

// values[i] <- function(values[i], other[i]) for whole vectors; count is a multiple of the width.
template <typename T, typename Function>
SR_INLINE void transform(T* values, const T* other, int64_t count, const Function& function) {
  for (int64_t i = 0; i < count; i += Simd<T>::width)
    store<T>(values + i, function(load(values + i), load(other + i)));
}

template <typename T>
SR_INLINE Vec<T> gaussian_cdf(Vec<T> v) {
  return T(0.5) * (T(1) + erf(v * T(0.70710678118654752440)));
}

// z <- act(z), in place.
template <typename T>
void activate_row(Activation activation, T slope, T* z, int64_t count) {
  using V = Vec<T>;
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kRelu:
      return transform(z, z, count, [](V v, V) { return v < 0 ? V{} : v; });
    case Activation::kLeakyRelu:
      return transform(z, z, count, [slope](V v, V) { return v > 0 ? v : v * slope; });
    case Activation::kGelu:
      return transform(z, z, count, [](V v, V) { return v * gaussian_cdf<T>(v); });
    case Activation::kSilu:
      return transform(z, z, count, [](V v, V) { return v * sigmoid(v); });
  }
}

// Activations that cost an instruction or two are applied to a product's accumulators; exp and erf
// would push those out of their registers.
SR_INLINE bool fits_in_epilogue(Activation activation) {
  return activation != Activation::kGelu && activation != Activation::kSilu;
}
template <typename T>
SR_INLINE Vec<T> activate_in_epilogue(Activation activation, T slope, Vec<T> v) {
  if (activation == Activation::kRelu) return v < 0 ? Vec<T>{} : v;
  if (activation == Activation::kLeakyRelu) return v > 0 ? v : v * slope;
  return v;
}

}  // namespace
}  // namespace SR_KERNELS_ISA
}  // namespace sr_kernels
