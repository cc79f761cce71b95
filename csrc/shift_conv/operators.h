// The shift convolution's operators, for any device: checks, outputs, params. Backend says what a
// device adds to that: a Guard, made from x before anything else, and run(params, x).
#pragma once

#include "shift_conv/arguments.h"
#include "torch_adapter.h"

namespace sr_kernels {

template <typename Backend>
struct ShiftConvOperators {
  static Tensor shift_conv2d(const Tensor& x, const Tensor& weight_in,
                             const std::optional<Tensor>& bias_in,
                             const std::optional<Tensor>& residual, int64_t activation,
                             double negative_slope, int64_t pattern, int64_t groups) {
    [[maybe_unused]] const typename Backend::Guard guard(x);
    const Tensor weight = dense(weight_in);
    const std::optional<Tensor> bias = dense(bias_in);
    ShiftConvParams p = conv_params("shift_conv2d", x, weight, bias, residual, activation,
                                    negative_slope, pattern, groups);
    Tensor y = new_feature_map(x, p.c_out);
    p.y = feature_map(y);
    if (y.numel() > 0) Backend::run(p, x);
    return y;
  }

  static std::tuple<Tensor, Tensor, Tensor> shift_conv2d_backward(
      const Tensor& grad, const Tensor& x, const Tensor& weight_in,
      const std::optional<Tensor>& bias_in, int64_t activation, double negative_slope,
      int64_t pattern, int64_t groups, bool need_x, bool need_weight, bool need_bias) {
    [[maybe_unused]] const typename Backend::Guard guard(x);
    const Tensor weight = dense(weight_in);
    const std::optional<Tensor> bias = dense(bias_in);
    ShiftConvBackwardParams p{};
    p.forward = conv_params("shift_conv2d_backward", x, weight, bias, std::nullopt, activation,
                            negative_slope, pattern, groups);
    const ShiftConvParams& f = p.forward;
    require_shape(grad, {f.batch, f.c_out, f.height, f.width}, "grad");
    require_like(grad, x, "grad", "x");
    p.grad = feature_map(grad);
    Tensor dx = need_x ? new_feature_map(x, f.c_in) : no_gradient(x);
    Tensor dweight = need_weight ? new_tensor(x, {f.c_out, f.c_in, 1, 1}) : no_gradient(x);
    Tensor dbias = need_bias ? new_tensor(x, {f.c_out}) : no_gradient(x);
    if (need_x) p.dx = feature_map(dx);
    if (need_weight) p.dweight = dweight.data_ptr();
    if (need_bias) p.dbias = dbias.data_ptr();
    Backend::run(p, x);
    return {dx, dweight, dbias};
  }

  static Tensor shift_conv_block(const Tensor& x, const Tensor& w0_in,
                                 const std::optional<Tensor>& b0_in, const Tensor& w1_in,
                                 const std::optional<Tensor>& b1_in, int64_t activation,
                                 double negative_slope, bool residual, int64_t pattern,
                                 int64_t groups) {
    [[maybe_unused]] const typename Backend::Guard guard(x);
    const Tensor w0 = dense(w0_in), w1 = dense(w1_in);
    const std::optional<Tensor> b0 = dense(b0_in), b1 = dense(b1_in);
    ShiftConvBlockParams p = block_params("shift_conv_block", x, w0, b0, w1, b1, activation,
                                          negative_slope, residual, pattern, groups);
    Tensor y = new_feature_map(x, p.c_out);
    p.y = feature_map(y);
    if (y.numel() > 0) Backend::run(p, x);
    return y;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> shift_conv_block_backward(
      const Tensor& grad, const Tensor& x, const Tensor& w0_in, const std::optional<Tensor>& b0_in,
      const Tensor& w1_in, int64_t activation, double negative_slope, bool residual,
      int64_t pattern, int64_t groups, bool need_x, bool need_w0, bool need_b0, bool need_w1,
      bool need_b1) {
    [[maybe_unused]] const typename Backend::Guard guard(x);
    const Tensor w0 = dense(w0_in), w1 = dense(w1_in);
    const std::optional<Tensor> b0 = dense(b0_in);
    ShiftConvBlockBackwardParams p{};
    p.forward = block_params("shift_conv_block_backward", x, w0, b0, w1, std::nullopt, activation,
                             negative_slope, residual, pattern, groups);
    const ShiftConvBlockParams& f = p.forward;
    require_shape(grad, {f.batch, f.c_out, f.height, f.width}, "grad");
    require_like(grad, x, "grad", "x");
    p.grad = feature_map(grad);
    Tensor dx = need_x ? new_feature_map(x, f.c_in) : no_gradient(x);
    Tensor dw0 = need_w0 ? new_tensor(x, {f.c_hidden, f.c_in, 1, 1}) : no_gradient(x);
    Tensor db0 = need_b0 ? new_tensor(x, {f.c_hidden}) : no_gradient(x);
    Tensor dw1 = need_w1 ? new_tensor(x, {f.c_out, f.c_hidden, 1, 1}) : no_gradient(x);
    Tensor db1 = need_b1 ? new_tensor(x, {f.c_out}) : no_gradient(x);
    if (need_x) p.dx = feature_map(dx);
    if (need_w0) p.dw0 = dw0.data_ptr();
    if (need_b0) p.db0 = db0.data_ptr();
    if (need_w1) p.dw1 = dw1.data_ptr();
    if (need_b1) p.db1 = db1.data_ptr();
    Backend::run(p, x);
    return {dx, dw0, db0, dw1, db1};
  }

  template <typename Library>
  static void implement(Library& m) {
    m.impl("shift_conv2d", TORCH_BOX(&ShiftConvOperators::shift_conv2d));
    m.impl("shift_conv2d_backward", TORCH_BOX(&ShiftConvOperators::shift_conv2d_backward));
    m.impl("shift_conv_block", TORCH_BOX(&ShiftConvOperators::shift_conv_block));
    m.impl("shift_conv_block_backward", TORCH_BOX(&ShiftConvOperators::shift_conv_block_backward));
  }
};

}  // namespace sr_kernels
