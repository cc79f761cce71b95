// From the operators' arguments to the kernels' params, with every check: for the operators of all
// devices. Weights and gates must have been made dense by the caller, who owns the copies.
#pragma once

#include "attention_gates/params.h"
#include "torch_adapter.h"

namespace sr_kernels {

// A weight or bias: of this shape, and with the dtype and device of x.
inline void require_parameter(const Tensor& parameter, const std::vector<int64_t>& shape,
                              const Tensor& x, const char* name) {
  require_shape(parameter, shape, name);
  require_like(parameter, x, name, "x");
}
inline void require_parameter(const std::optional<Tensor>& parameter,
                              const std::vector<int64_t>& shape, const Tensor& x,
                              const char* name) {
  if (parameter.has_value()) require_parameter(*parameter, shape, x, name);
}

inline void require_grad(const Tensor& grad, const Tensor& x, int64_t channels) {
  require_shape(grad, {x.size(0), channels, x.size(2), x.size(3)}, "grad");
  require_like(grad, x, "grad", "x");
}

// The fields that every params struct shares.
template <typename Params>
void set_image(Params& p, const char* op, const Tensor& x) {
  require_feature_map(x, "x");
  require(x.size(1) > 0, op, ": x must have at least one channel, got ", shape_of(x));
  p.kind = scalar_kind(x, "x");
  p.batch = x.size(0);
  p.height = x.size(2);
  p.width = x.size(3);
  p.x = feature_map(x);
}

inline PixelAttentionParams pixel_params(const char* op, const Tensor& x, const Tensor& weight,
                                         const std::optional<Tensor>& bias) {
  PixelAttentionParams p{};
  set_image(p, op, x);
  p.channels = x.size(1);
  require_parameter(weight, {p.channels, p.channels, 1, 1}, x, "weight");
  require_parameter(bias, {p.channels}, x, "bias");
  p.weight = weight.data_ptr();
  p.bias = data_or_null(bias);
  return p;
}

inline void set_spatial_weight(SpatialAttentionParams& p, const char* op, const Tensor& x,
                               const Tensor& weight, const std::optional<Tensor>& bias,
                               const char* weight_name, const char* bias_name) {
  require(weight.dim() == 4 && weight.size(0) == 1 && weight.size(1) == 2 &&
              weight.size(2) == weight.size(3) && weight.size(2) % 2 == 1,
          op, ": ", weight_name, " must have shape (1, 2, k, k) with k odd, got ",
          shape_of(weight));
  require_like(weight, x, weight_name, "x");
  require_parameter(bias, {1}, x, bias_name);
  p.kernel = weight.size(2);
  p.weight = weight.data_ptr();
  p.bias = data_or_null(bias);
}

inline SpatialAttentionParams spatial_params(const char* op, const Tensor& x, const Tensor& weight,
                                             const std::optional<Tensor>& bias) {
  SpatialAttentionParams p{};
  set_image(p, op, x);
  p.channels = x.size(1);
  set_spatial_weight(p, op, x, weight, bias, "weight", "bias");
  return p;
}

inline SpatialAttentionParams pixel_spatial_params(const char* op, const Tensor& x,
                                                   const Tensor& pixel_weight,
                                                   const std::optional<Tensor>& pixel_bias,
                                                   const Tensor& spatial_weight,
                                                   const std::optional<Tensor>& spatial_bias) {
  SpatialAttentionParams p{};
  set_image(p, op, x);
  p.channels = x.size(1);
  require_parameter(pixel_weight, {p.channels, p.channels, 1, 1}, x, "pixel_weight");
  require_parameter(pixel_bias, {p.channels}, x, "pixel_bias");
  p.pixel_weight = pixel_weight.data_ptr();
  p.pixel_bias = data_or_null(pixel_bias);
  set_spatial_weight(p, op, x, spatial_weight, spatial_bias, "spatial_weight", "spatial_bias");
  return p;
}

inline Tensor spatial_workspace(const Tensor& x, int64_t planes) {
  return new_tensor(x, {x.size(0), planes, x.size(2), x.size(3)}, compute_type(x));
}

inline ChannelAttentionParams channel_params(const char* op, const Tensor& x, const Tensor& w_down,
                                             const std::optional<Tensor>& b_down,
                                             const Tensor& w_up, const std::optional<Tensor>& b_up,
                                             int64_t statistic) {
  ChannelAttentionParams p{};
  set_image(p, op, x);
  p.channels = x.size(1);
  require(statistic == 0 || statistic == 1, op,
          ": statistic must be 0 (mean) or 1 (contrast), got ", statistic);
  require(w_down.dim() == 4 && w_down.size(0) > 0, op, ": w_down must have shape (R, ", p.channels,
          ", 1, 1) with R at least 1, got ", shape_of(w_down));
  p.hidden = w_down.size(0);
  p.contrast = statistic == 1;
  require_parameter(w_down, {p.hidden, p.channels, 1, 1}, x, "w_down");
  require_parameter(b_down, {p.hidden}, x, "b_down");
  require_parameter(w_up, {p.channels, p.hidden, 1, 1}, x, "w_up");
  require_parameter(b_up, {p.channels}, x, "b_up");
  p.w_down = w_down.data_ptr();
  p.b_down = data_or_null(b_down);
  p.w_up = w_up.data_ptr();
  p.b_up = data_or_null(b_up);
  return p;
}

inline GatedConvParams gated_params(const char* op, const Tensor& x, const Tensor& gate,
                                    const Tensor& weight, const std::optional<Tensor>& bias,
                                    const std::optional<Tensor>& residual) {
  GatedConvParams p{};
  set_image(p, op, x);
  p.c_in = x.size(1);
  require(weight.dim() == 4 && weight.size(0) > 0, op, ": weight must have shape (C_out, ", p.c_in,
          ", 1, 1), got ", shape_of(weight));
  p.c_out = weight.size(0);
  require_parameter(weight, {p.c_out, p.c_in, 1, 1}, x, "weight");
  require_parameter(gate, {p.batch, p.c_in, 1, 1}, x, "gate");
  require_parameter(bias, {p.c_out}, x, "bias");
  require_parameter(residual, {p.batch, p.c_out, p.height, p.width}, x, "residual");
  p.residual = feature_map(residual);
  p.gate = gate.data_ptr();
  p.weight = weight.data_ptr();
  p.bias = data_or_null(bias);
  return p;
}

}  // namespace sr_kernels
