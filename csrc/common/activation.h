// Activations and their derivatives. The CPU kernels have the same formulas on vectors.
//
//   relu        max(z, 0)                      leaky_relu  z > 0 ? z : slope * z
//   gelu        z * Phi(z), the exact erf form  silu        z * sigmoid(z)
#pragma once

#include <cmath>

#include "common/platform.h"

namespace sr_kernels {

enum class Activation : int { kNone = 0, kRelu = 1, kLeakyRelu = 2, kGelu = 3, kSilu = 4 };

template <typename T>
SR_HOST_DEVICE T activate(Activation activation, T z, T slope) {
  switch (activation) {
    case Activation::kRelu:
      return z < T(0) ? T(0) : z;  // written so that NaN passes, as in torch.relu
    case Activation::kLeakyRelu:
      return z > T(0) ? z : z * slope;
    case Activation::kGelu:
      return z * T(0.5) * (T(1) + std::erf(z * T(0.70710678118654752440)));
    case Activation::kSilu:
      return z / (T(1) + std::exp(-z));
    case Activation::kNone:
      break;
  }
  return z;
}

// d activate / dz. At z = 0 relu has derivative 0 and leaky_relu has slope, as in torch.
template <typename T>
SR_HOST_DEVICE T activation_derivative(Activation activation, T z, T slope) {
  switch (activation) {
    case Activation::kRelu:
      return z > T(0) ? T(1) : T(0);
    case Activation::kLeakyRelu:
      return z > T(0) ? T(1) : slope;
    case Activation::kGelu: {
      const T cdf = T(0.5) * (T(1) + std::erf(z * T(0.70710678118654752440)));
      return cdf + z * std::exp(-z * z * T(0.5)) * T(0.39894228040143267794);
    }
    case Activation::kSilu: {
      const T s = T(1) / (T(1) + std::exp(-z));
      return s * (T(1) + z * (T(1) - s));
    }
    case Activation::kNone:
      break;
  }
  return T(1);
}

}  // namespace sr_kernels
