// The 3x3 convolution's operator, for any device: checks, outputs, params. Backend says what a
// device adds to that: a Guard, made from x before anything else, and run(params, x).
#pragma once

#include "conv3x3/arguments.h"
#include "torch_adapter.h"

namespace sr_kernels {

template <typename Backend>
struct Conv3x3Operators {
  static Tensor conv3x3(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias_in,
                        const std::optional<Tensor>& skip, int64_t activation,
                        double negative_slope) {
    [[maybe_unused]] const typename Backend::Guard guard(x);
    const std::optional<Tensor> bias = dense(bias_in);
    Conv3x3Params p = conv3x3_params(x, weight, bias, skip, activation, negative_slope);
    Tensor y = new_feature_map(x, p.c_out);
    p.y = feature_map(y);
    if (y.numel() > 0) Backend::run(p, x);
    return y;
  }

  template <typename Library>
  static void implement(Library& m) {
    m.impl("conv3x3", TORCH_BOX(&Conv3x3Operators::conv3x3));
  }
};

}  // namespace sr_kernels
