// From the operator's arguments to the kernel's params, with every check: shared by the CPU and the
// CUDA operators.
#pragma once

#include "conv3x3/params.h"
#include "torch_adapter.h"

namespace sr_kernels {

// Everything but y.
inline Conv3x3Params conv3x3_params(const Tensor& x, const Tensor& weight,
                                    const std::optional<Tensor>& bias,
                                    const std::optional<Tensor>& skip, int64_t activation,
                                    double negative_slope) {
  require_feature_map(x, "x");
  require(x.size(1) > 0, "conv3x3: x must have at least one channel, got ", shape_of(x));
  require(activation >= 0 && activation <= static_cast<int64_t>(Activation::kSilu),
          "conv3x3: activation must be 0..4, got ", activation);
  require(weight.dim() == 4 && weight.size(0) > 0 && weight.size(1) == x.size(1) &&
              weight.size(2) == 3 && weight.size(3) == 3,
          "weight must have shape (C_out, ", x.size(1), ", 3, 3), got ", shape_of(weight));
  require_like(weight, x, "weight", "x");
  Conv3x3Params p{};
  p.kind = scalar_kind(x, "x");
  p.batch = x.size(0);
  p.height = x.size(2);
  p.width = x.size(3);
  p.c_in = x.size(1);
  p.c_out = weight.size(0);
  p.activation = static_cast<Activation>(activation);
  p.negative_slope = negative_slope;
  p.x = feature_map(x);
  p.weight = feature_map(weight);
  if (bias.has_value()) {
    require_shape(*bias, {p.c_out}, "bias");
    require_like(*bias, x, "bias", "x");
    p.bias = bias->data_ptr();
  }
  if (skip.has_value()) {
    require_shape(*skip, {p.batch, p.c_out, p.height, p.width}, "skip");
    require_like(*skip, x, "skip", "x");
    p.skip = feature_map(*skip);
  }
  return p;
}

}  // namespace sr_kernels
