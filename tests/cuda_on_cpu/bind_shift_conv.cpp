// The shift convolution's CUDA launches, with the arguments of the operators of csrc/library.cpp,
// then the arrays for the results.
#include "arrays.h"
#include "shift_conv/launch.cu"

using namespace sr_kernels;

namespace {

using Object = py::object;

ShiftConvParams conv_params(int kind, const Array& x, const Array& weight, const Array& bias,
                            int activation, double slope, int pattern, int groups) {
  ShiftConvParams p{};
  p.kind = static_cast<ScalarKind>(kind);
  p.batch = x.size(0);
  p.c_in = x.size(1);
  p.height = x.size(2);
  p.width = x.size(3);
  p.c_out = weight.size(0);
  p.pattern = static_cast<ShiftPattern>(pattern);
  p.groups = groups;
  p.activation = static_cast<Activation>(activation);
  p.negative_slope = slope;
  p.x = x.map();
  p.weight = weight.data();
  p.bias = bias.data();
  return p;
}

ShiftConvBlockParams block_params(int kind, const Array& x, const Array& w0, const Array& b0,
                                  const Array& w1, int activation, double slope, bool residual,
                                  int pattern, int groups) {
  ShiftConvBlockParams p{};
  p.kind = static_cast<ScalarKind>(kind);
  p.batch = x.size(0);
  p.c_in = x.size(1);
  p.height = x.size(2);
  p.width = x.size(3);
  p.c_hidden = w0.size(0);
  p.c_out = w1.size(0);
  p.pattern = static_cast<ShiftPattern>(pattern);
  p.groups = groups;
  p.activation = static_cast<Activation>(activation);
  p.negative_slope = slope;
  p.residual = residual;
  p.x = x.map();
  p.w0 = w0.data();
  p.b0 = b0.data();
  p.w1 = w1.data();
  return p;
}

}  // namespace

PYBIND11_MODULE(shift_conv, m) {
  m.def("set_schedule", &cuda_on_cpu::set_schedule);
  // Bytes a block of each kernel asks for; of block_kernel with c_in channels.
  m.def("shared_bytes", [](int c_in) {
    py::dict bytes;
    bytes["conv_kernel<float>"] = ConvTile<float>::kSharedBytes;
    bytes["conv_kernel<__half>"] = ConvTile<__half>::kSharedBytes;
    bytes["block_kernel<float, 1>"] = BlockTile<float, 1>::shared_bytes(c_in);
    bytes["block_kernel<__half, 1>"] = BlockTile<__half, 1>::shared_bytes(c_in);
    bytes["block_kernel<__half, 3>"] = BlockTile<__half, 3>::shared_bytes(c_in);
    using Backward = HiddenTile<__half>;
    bytes["block_input_gradient_kernel<__half>"] =
        Backward::input_gradient_bytes(Activation::kRelu);
    bytes["block_input_gradient_kernel<__half> with gelu"] =
        Backward::input_gradient_bytes(Activation::kGelu);
    bytes["block_weight_gradient_kernel<__half>"] = Backward::weight_gradient_bytes(3);
    bytes["weight_gradient_kernel<float>"] = WeightGradientTile<float>::kSharedBytes;
    bytes["weight_gradient_kernel<__half>"] = WeightGradientTile<__half>::kSharedBytes;
    return bytes;
  });
  m.def("shift_conv2d", [](int kind, Object x_, Object weight_, Object bias_, Object residual_,
                           int activation, double slope, int pattern, int groups, Object y_) {
    const Array x(x_), weight(weight_), bias(bias_), residual(residual_), y(y_);
    ShiftConvParams p = conv_params(kind, x, weight, bias, activation, slope, pattern, groups);
    p.residual = residual.map();
    p.y = y.map();
    require_success(launch_shift_conv2d(p, nullptr));
  });
  m.def("shift_conv2d_backward",
        [](int kind, Object grad_, Object x_, Object weight_, Object bias_, int activation,
           double slope, int pattern, int groups, Object dx_, Object dweight_, Object dbias_) {
          const Array grad(grad_), x(x_), weight(weight_), bias(bias_), dx(dx_), dweight(dweight_),
              dbias(dbias_);
          ShiftConvBackwardParams p{};
          p.forward = conv_params(kind, x, weight, bias, activation, slope, pattern, groups);
          p.grad = grad.map();
          p.dx = dx.map();
          p.dweight = dweight.data();
          p.dbias = dbias.data();
          Workspace workspace(shift_conv2d_backward_workspace(p));
          require_success(launch_shift_conv2d_backward(p, workspace.data(), nullptr));
        });
  m.def("shift_conv_block", [](int kind, Object x_, Object w0_, Object b0_, Object w1_, Object b1_,
                               int activation, double slope, bool residual, int pattern, int groups,
                               Object y_) {
    const Array x(x_), w0(w0_), b0(b0_), w1(w1_), b1(b1_), y(y_);
    ShiftConvBlockParams p =
        block_params(kind, x, w0, b0, w1, activation, slope, residual, pattern, groups);
    p.b1 = b1.data();
    p.y = y.map();
    const int64_t bytes = shift_conv_block_workspace(p);
    Workspace workspace(bytes);
    require_success(launch_shift_conv_block(p, bytes > 0 ? workspace.data() : nullptr, nullptr));
    return bytes;
  });
  m.def("shift_conv_block_backward", [](int kind, Object grad_, Object x_, Object w0_, Object b0_,
                                        Object w1_, int activation, double slope, bool residual,
                                        int pattern, int groups, Object dx_, Object dw0_,
                                        Object db0_, Object dw1_, Object db1_) {
    const Array grad(grad_), x(x_), w0(w0_), b0(b0_), w1(w1_), dx(dx_), dw0(dw0_), db0(db0_),
        dw1(dw1_), db1(db1_);
    ShiftConvBlockBackwardParams p{};
    p.forward = block_params(kind, x, w0, b0, w1, activation, slope, residual, pattern, groups);
    p.grad = grad.map();
    p.dx = dx.map();
    p.dw0 = dw0.data();
    p.db0 = db0.data();
    p.dw1 = dw1.data();
    p.db1 = db1.data();
    const int64_t bytes = shift_conv_block_backward_workspace(p);
    Workspace workspace(bytes);
    require_success(launch_shift_conv_block_backward(p, workspace.data(), nullptr));
    return bytes;
  });
}
