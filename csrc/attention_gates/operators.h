// The attention gates' operators, for any device: checks, outputs, params. Backend says what a
// device adds to that: a Guard, made before anything else, and run(params, x), workspaces included.
#pragma once

#include "attention_gates/arguments.h"
#include "torch_adapter.h"

namespace sr_kernels {

template <typename Backend>
struct AttentionGateOperators {
  using OptionalTensor = std::optional<Tensor>;
  using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

  // A gradient that was asked for, shaped as its weight, or the empty one.
  static Tensor weight_gradient(bool needed, const Tensor& x, const std::vector<int64_t>& shape) {
    return needed ? new_tensor(x, shape) : no_gradient(x);
  }
  static void* wanted(bool needed, const Tensor& gradient) {
    return needed ? gradient.data_ptr() : nullptr;
  }

  static Tensor pixel_attention(const Tensor& x, const Tensor& weight_in,
                                const OptionalTensor& bias_in) {
    [[maybe_unused]] const typename Backend::Guard guard(x);
    const Tensor weight = dense(weight_in);
    const OptionalTensor bias = dense(bias_in);
    PixelAttentionParams p = pixel_params("pixel_attention", x, weight, bias);
    Tensor y = new_feature_map(x, p.channels);
    p.y = feature_map(y);
    if (y.numel() > 0) Backend::run(p, x);
    return y;
  }

  static std::tuple<Tensor, Tensor, Tensor> pixel_attention_backward(
      const Tensor& grad, const Tensor& x, const Tensor& weight_in, const OptionalTensor& bias_in,
      bool need_x, bool need_weight, bool need_bias) {
    [[maybe_unused]] const typename Backend::Guard guard(x);
    const Tensor weight = dense(weight_in);
    const OptionalTensor bias = dense(bias_in);
    PixelAttentionBackwardParams p{};
    p.forward = pixel_params("pixel_attention_backward", x, weight, bias);
    const int64_t channels = p.forward.channels;
    require_grad(grad, x, channels);
    p.grad = feature_map(grad);
    Tensor dx = need_x ? new_feature_map(x, channels) : no_gradient(x);
    Tensor dweight = weight_gradient(need_weight, x, {channels, channels, 1, 1});
    Tensor dbias = weight_gradient(need_bias, x, {channels});
    if (need_x) p.dx = feature_map(dx);
    p.dweight = wanted(need_weight, dweight);
    p.dbias = wanted(need_bias, dbias);
    Backend::run(p, x);
    return {dx, dweight, dbias};
  }

  // Runs both spatial_attention and pixel_spatial_attention.
  static Tensor run_spatial(SpatialAttentionParams& p, const Tensor& x) {
    Tensor y = new_feature_map(x, p.channels);
    p.y = feature_map(y);
    if (y.numel() == 0) return y;
    Backend::run(p, x);
    return y;
  }

  static Tensor spatial_attention(const Tensor& x, const Tensor& weight_in,
                                  const OptionalTensor& bias_in) {
    [[maybe_unused]] const typename Backend::Guard guard(x);
    const Tensor weight = dense(weight_in);
    const OptionalTensor bias = dense(bias_in);
    SpatialAttentionParams p = spatial_params("spatial_attention", x, weight, bias);
    return run_spatial(p, x);
  }

  static Tensor pixel_spatial_attention(const Tensor& x, const Tensor& pixel_weight_in,
                                        const OptionalTensor& pixel_bias_in,
                                        const Tensor& spatial_weight_in,
                                        const OptionalTensor& spatial_bias_in) {
    [[maybe_unused]] const typename Backend::Guard guard(x);
    const Tensor pixel_weight = dense(pixel_weight_in), spatial_weight = dense(spatial_weight_in);
    const OptionalTensor pixel_bias = dense(pixel_bias_in), spatial_bias = dense(spatial_bias_in);
    SpatialAttentionParams p = pixel_spatial_params("pixel_spatial_attention", x, pixel_weight,
                                                    pixel_bias, spatial_weight, spatial_bias);
    return run_spatial(p, x);
  }

  static void run_spatial_backward(SpatialAttentionBackwardParams& p, const Tensor& x) {
    Backend::run(p, x);
  }

  static std::tuple<Tensor, Tensor, Tensor> spatial_attention_backward(
      const Tensor& grad, const Tensor& x, const Tensor& weight_in, const OptionalTensor& bias_in,
      bool need_x, bool need_weight, bool need_bias) {
    [[maybe_unused]] const typename Backend::Guard guard(x);
    const Tensor weight = dense(weight_in);
    const OptionalTensor bias = dense(bias_in);
    SpatialAttentionBackwardParams p{};
    p.forward = spatial_params("spatial_attention_backward", x, weight, bias);
    const int64_t channels = p.forward.channels, kernel = p.forward.kernel;
    require_grad(grad, x, channels);
    p.grad = feature_map(grad);
    Tensor dx = need_x ? new_feature_map(x, channels) : no_gradient(x);
    Tensor dweight = weight_gradient(need_weight, x, {1, 2, kernel, kernel});
    Tensor dbias = weight_gradient(need_bias, x, {1});
    if (need_x) p.dx = feature_map(dx);
    p.dweight = wanted(need_weight, dweight);
    p.dbias = wanted(need_bias, dbias);
    run_spatial_backward(p, x);
    return {dx, dweight, dbias};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pixel_spatial_attention_backward(
      const Tensor& grad, const Tensor& x, const Tensor& pixel_weight_in,
      const OptionalTensor& pixel_bias_in, const Tensor& spatial_weight_in,
      const OptionalTensor& spatial_bias_in, bool need_x, bool need_pixel_weight,
      bool need_pixel_bias, bool need_spatial_weight, bool need_spatial_bias) {
    [[maybe_unused]] const typename Backend::Guard guard(x);
    const Tensor pixel_weight = dense(pixel_weight_in), spatial_weight = dense(spatial_weight_in);
    const OptionalTensor pixel_bias = dense(pixel_bias_in), spatial_bias = dense(spatial_bias_in);
    SpatialAttentionBackwardParams p{};
    p.forward = pixel_spatial_params("pixel_spatial_attention_backward", x, pixel_weight,
                                     pixel_bias, spatial_weight, spatial_bias);
    const int64_t channels = p.forward.channels, kernel = p.forward.kernel;
    require_grad(grad, x, channels);
    p.grad = feature_map(grad);
    Tensor dx = need_x ? new_feature_map(x, channels) : no_gradient(x);
    Tensor dpixel_weight = weight_gradient(need_pixel_weight, x, {channels, channels, 1, 1});
    Tensor dpixel_bias = weight_gradient(need_pixel_bias, x, {channels});
    Tensor dspatial_weight = weight_gradient(need_spatial_weight, x, {1, 2, kernel, kernel});
    Tensor dspatial_bias = weight_gradient(need_spatial_bias, x, {1});
    if (need_x) p.dx = feature_map(dx);
    p.dpixel_weight = wanted(need_pixel_weight, dpixel_weight);
    p.dpixel_bias = wanted(need_pixel_bias, dpixel_bias);
    p.dweight = wanted(need_spatial_weight, dspatial_weight);
    p.dbias = wanted(need_spatial_bias, dspatial_bias);
    run_spatial_backward(p, x);
    return {dx, dpixel_weight, dpixel_bias, dspatial_weight, dspatial_bias};
  }

  static Tensor channel_gate(const Tensor& x, const Tensor& w_down_in,
                             const OptionalTensor& b_down_in, const Tensor& w_up_in,
                             const OptionalTensor& b_up_in, int64_t statistic) {
    [[maybe_unused]] const typename Backend::Guard guard(x);
    const Tensor w_down = dense(w_down_in), w_up = dense(w_up_in);
    const OptionalTensor b_down = dense(b_down_in), b_up = dense(b_up_in);
    ChannelAttentionParams p =
        channel_params("channel_gate", x, w_down, b_down, w_up, b_up, statistic);
    require(x.size(2) > 0 && x.size(3) > 0, "channel_gate: x must have at least one pixel, got ",
            shape_of(x));
    Tensor gate = new_tensor(x, {p.batch, p.channels, 1, 1});
    p.gate = gate.data_ptr();
    if (gate.numel() > 0) Backend::run(p, x);
    return gate;
  }

  static Tensor channel_attention(const Tensor& x, const Tensor& w_down_in,
                                  const OptionalTensor& b_down_in, const Tensor& w_up_in,
                                  const OptionalTensor& b_up_in, int64_t statistic) {
    [[maybe_unused]] const typename Backend::Guard guard(x);
    const Tensor w_down = dense(w_down_in), w_up = dense(w_up_in);
    const OptionalTensor b_down = dense(b_down_in), b_up = dense(b_up_in);
    ChannelAttentionParams p =
        channel_params("channel_attention", x, w_down, b_down, w_up, b_up, statistic);
    Tensor y = new_feature_map(x, p.channels);
    p.y = feature_map(y);
    if (y.numel() > 0) Backend::run(p, x);
    return y;
  }

  static FiveTensors channel_backward(const char* op, bool grad_of_gate, const Tensor& grad,
                                      const Tensor& x, const Tensor& w_down_in,
                                      const OptionalTensor& b_down_in, const Tensor& w_up_in,
                                      const OptionalTensor& b_up_in, int64_t statistic, bool need_x,
                                      bool need_w_down, bool need_b_down, bool need_w_up,
                                      bool need_b_up) {
    [[maybe_unused]] const typename Backend::Guard guard(x);
    const Tensor w_down = dense(w_down_in), w_up = dense(w_up_in);
    const OptionalTensor b_down = dense(b_down_in), b_up = dense(b_up_in);
    ChannelAttentionBackwardParams p{};
    p.forward = channel_params(op, x, w_down, b_down, w_up, b_up, statistic);
    const int64_t channels = p.forward.channels, hidden = p.forward.hidden;
    if (grad_of_gate) {
      require_shape(grad, {x.size(0), channels, 1, 1}, "grad");
      require_like(grad, x, "grad", "x");
    } else {
      require_grad(grad, x, channels);
    }
    p.grad = feature_map(grad);
    p.grad_of_gate = grad_of_gate;
    Tensor dx = need_x ? new_feature_map(x, channels) : no_gradient(x);
    Tensor dw_down = weight_gradient(need_w_down, x, {hidden, channels, 1, 1});
    Tensor db_down = weight_gradient(need_b_down, x, {hidden});
    Tensor dw_up = weight_gradient(need_w_up, x, {channels, hidden, 1, 1});
    Tensor db_up = weight_gradient(need_b_up, x, {channels});
    if (need_x) p.dx = feature_map(dx);
    p.dw_down = wanted(need_w_down, dw_down);
    p.db_down = wanted(need_b_down, db_down);
    p.dw_up = wanted(need_w_up, dw_up);
    p.db_up = wanted(need_b_up, db_up);
    Backend::run(p, x);
    return {dx, dw_down, db_down, dw_up, db_up};
  }

  static FiveTensors channel_gate_backward(const Tensor& grad, const Tensor& x,
                                           const Tensor& w_down, const OptionalTensor& b_down,
                                           const Tensor& w_up, const OptionalTensor& b_up,
                                           int64_t statistic, bool need_x, bool need_w_down,
                                           bool need_b_down, bool need_w_up, bool need_b_up) {
    return channel_backward("channel_gate_backward", true, grad, x, w_down, b_down, w_up, b_up,
                            statistic, need_x, need_w_down, need_b_down, need_w_up, need_b_up);
  }

  static FiveTensors channel_attention_backward(const Tensor& grad, const Tensor& x,
                                                const Tensor& w_down, const OptionalTensor& b_down,
                                                const Tensor& w_up, const OptionalTensor& b_up,
                                                int64_t statistic, bool need_x, bool need_w_down,
                                                bool need_b_down, bool need_w_up, bool need_b_up) {
    return channel_backward("channel_attention_backward", false, grad, x, w_down, b_down, w_up,
                            b_up, statistic, need_x, need_w_down, need_b_down, need_w_up,
                            need_b_up);
  }

  static Tensor gated_conv1x1(const Tensor& x, const Tensor& gate_in, const Tensor& weight_in,
                              const OptionalTensor& bias_in, const OptionalTensor& residual) {
    [[maybe_unused]] const typename Backend::Guard guard(x);
    const Tensor gate = dense(gate_in), weight = dense(weight_in);
    const OptionalTensor bias = dense(bias_in);
    GatedConvParams p = gated_params("gated_conv1x1", x, gate, weight, bias, residual);
    Tensor y = new_feature_map(x, p.c_out);
    p.y = feature_map(y);
    if (y.numel() > 0) Backend::run(p, x);
    return y;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> gated_conv1x1_backward(
      const Tensor& grad, const Tensor& x, const Tensor& gate_in, const Tensor& weight_in,
      bool need_x, bool need_gate, bool need_weight, bool need_bias) {
    [[maybe_unused]] const typename Backend::Guard guard(x);
    const Tensor gate = dense(gate_in), weight = dense(weight_in);
    GatedConvBackwardParams p{};
    p.forward = gated_params("gated_conv1x1_backward", x, gate, weight, std::nullopt, std::nullopt);
    const GatedConvParams& f = p.forward;
    require_grad(grad, x, f.c_out);
    p.grad = feature_map(grad);
    Tensor dx = need_x ? new_feature_map(x, f.c_in) : no_gradient(x);
    Tensor dgate = weight_gradient(need_gate, x, {f.batch, f.c_in, 1, 1});
    Tensor dweight = weight_gradient(need_weight, x, {f.c_out, f.c_in, 1, 1});
    Tensor dbias = weight_gradient(need_bias, x, {f.c_out});
    if (need_x) p.dx = feature_map(dx);
    p.dgate = wanted(need_gate, dgate);
    p.dweight = wanted(need_weight, dweight);
    p.dbias = wanted(need_bias, dbias);
    Backend::run(p, x);
    return {dx, dgate, dweight, dbias};
  }

  template <typename Library>
  static void implement(Library& m) {
    m.impl("pixel_attention", TORCH_BOX(&AttentionGateOperators::pixel_attention));
    m.impl("pixel_attention_backward",
           TORCH_BOX(&AttentionGateOperators::pixel_attention_backward));
    m.impl("spatial_attention", TORCH_BOX(&AttentionGateOperators::spatial_attention));
    m.impl("spatial_attention_backward",
           TORCH_BOX(&AttentionGateOperators::spatial_attention_backward));
    m.impl("pixel_spatial_attention", TORCH_BOX(&AttentionGateOperators::pixel_spatial_attention));
    m.impl("pixel_spatial_attention_backward",
           TORCH_BOX(&AttentionGateOperators::pixel_spatial_attention_backward));
    m.impl("channel_gate", TORCH_BOX(&AttentionGateOperators::channel_gate));
    m.impl("channel_gate_backward", TORCH_BOX(&AttentionGateOperators::channel_gate_backward));
    m.impl("channel_attention", TORCH_BOX(&AttentionGateOperators::channel_attention));
    m.impl("channel_attention_backward",
           TORCH_BOX(&AttentionGateOperators::channel_attention_backward));
    m.impl("gated_conv1x1", TORCH_BOX(&AttentionGateOperators::gated_conv1x1));
    m.impl("gated_conv1x1_backward", TORCH_BOX(&AttentionGateOperators::gated_conv1x1_backward));
  }
};

}  // namespace sr_kernels
