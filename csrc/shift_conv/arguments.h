// From the operators' arguments to the kernels' params, with every check: shared by the CPU and the
// CUDA operators.
#pragma once

#include "shift_conv/params.h"
#include "torch_adapter.h"

namespace sr_kernels {

inline void check_enums(const char* op, int64_t activation, int64_t pattern, int64_t groups) {
  require(activation >= 0 && activation <= static_cast<int64_t>(Activation::kSilu), op,
          ": activation must be 0..4, got ", activation);
  require(pattern >= 0 && pattern <= static_cast<int64_t>(ShiftPattern::kNone), op,
          ": pattern must be 0 (plus), 1 (cross) or 2 (none), got ", pattern);
  require(groups >= 4 && groups <= 1 << 20, op, ": groups must be at least 4, got ", groups);
}

// A 1x1 weight: (c_out, c_in, 1, 1). c_in or c_out of -1 accepts any.
inline void check_weight(const Tensor& x, const Tensor& weight, int64_t c_in, const char* name) {
  require(weight.dim() == 4 && weight.size(1) == c_in && weight.size(2) == 1 &&
              weight.size(3) == 1 && weight.size(0) > 0,
          name, " must have shape (C_out, ", c_in, ", 1, 1), got ", shape_of(weight));
  require_like(weight, x, name, "x");
}

inline void check_bias(const Tensor& x, const std::optional<Tensor>& bias, int64_t channels,
                       const char* name) {
  if (!bias.has_value()) return;
  require_shape(*bias, {channels}, name);
  require_like(*bias, x, name, "x");
}

inline ShiftConvParams conv_params(const char* op, const Tensor& x, const Tensor& weight,
                                   const std::optional<Tensor>& bias,
                                   const std::optional<Tensor>& residual, int64_t activation,
                                   double negative_slope, int64_t pattern, int64_t groups) {
  require_feature_map(x, "x");
  require(x.size(1) > 0, op, ": x must have at least one channel, got ", shape_of(x));
  check_enums(op, activation, pattern, groups);
  check_weight(x, weight, x.size(1), "weight");
  check_bias(x, bias, weight.size(0), "bias");
  ShiftConvParams p{};
  p.kind = scalar_kind(x, "x");
  p.batch = x.size(0);
  p.height = x.size(2);
  p.width = x.size(3);
  p.c_in = x.size(1);
  p.c_out = weight.size(0);
  p.pattern = static_cast<ShiftPattern>(pattern);
  p.groups = static_cast<int>(groups);
  p.activation = static_cast<Activation>(activation);
  p.negative_slope = negative_slope;
  p.x = feature_map(x);
  p.weight = weight.data_ptr();
  p.bias = data_or_null(bias);
  if (residual.has_value()) {
    require_shape(*residual, {p.batch, p.c_out, p.height, p.width}, "residual");
    require_like(*residual, x, "residual", "x");
    p.residual = feature_map(*residual);
  }
  return p;
}

inline ShiftConvBlockParams block_params(const char* op, const Tensor& x, const Tensor& w0,
                                         const std::optional<Tensor>& b0, const Tensor& w1,
                                         const std::optional<Tensor>& b1, int64_t activation,
                                         double negative_slope, bool residual, int64_t pattern,
                                         int64_t groups) {
  require_feature_map(x, "x");
  require(x.size(1) > 0, op, ": x must have at least one channel, got ", shape_of(x));
  check_enums(op, activation, pattern, groups);
  check_weight(x, w0, x.size(1), "w0");
  check_bias(x, b0, w0.size(0), "b0");
  check_weight(x, w1, w0.size(0), "w1");
  check_bias(x, b1, w1.size(0), "b1");
  require(!residual || w1.size(0) == x.size(1), op,
          ": residual needs as many output channels as input channels, got ", w1.size(0), " and ",
          x.size(1));
  ShiftConvBlockParams p{};
  p.kind = scalar_kind(x, "x");
  p.batch = x.size(0);
  p.height = x.size(2);
  p.width = x.size(3);
  p.c_in = x.size(1);
  p.c_hidden = w0.size(0);
  p.c_out = w1.size(0);
  p.pattern = static_cast<ShiftPattern>(pattern);
  p.groups = static_cast<int>(groups);
  p.activation = static_cast<Activation>(activation);
  p.negative_slope = negative_slope;
  p.residual = residual;
  p.x = feature_map(x);
  p.w0 = w0.data_ptr();
  p.b0 = data_or_null(b0);
  p.w1 = w1.data_ptr();
  p.b1 = data_or_null(b1);
  return p;
}

}  // namespace sr_kernels
