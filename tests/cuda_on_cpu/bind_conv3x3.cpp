// The 3x3 convolution's CUDA launches, with the arguments of the operator of csrc/library.cpp, then
// the array for the result.
#include "arrays.h"
#include "conv3x3/launch.cu"

using namespace sr_kernels;

using Object = py::object;

PYBIND11_MODULE(conv3x3, m) {
  m.def("set_schedule", &cuda_on_cpu::set_schedule);
  m.def("shared_bytes", [] {
    py::dict bytes;
    bytes["conv3x3_kernel<float>"] = Conv3x3Tile<float>::kSharedBytes;
    bytes["conv3x3_kernel<__half>"] = Conv3x3Tile<__half>::kSharedBytes;
    return bytes;
  });
  m.def("conv3x3", [](int kind, Object x_, Object weight_, Object bias_, Object skip_,
                      int activation, double slope, Object y_) {
    const Array x(x_), weight(weight_), bias(bias_), skip(skip_), y(y_);
    Conv3x3Params p{};
    p.kind = static_cast<ScalarKind>(kind);
    p.batch = x.size(0);
    p.c_in = x.size(1);
    p.height = x.size(2);
    p.width = x.size(3);
    p.c_out = weight.size(0);
    p.activation = static_cast<Activation>(activation);
    p.negative_slope = slope;
    p.x = x.map();
    p.weight = weight.map();
    p.bias = bias.data();
    p.skip = skip.map();
    p.y = y.map();
    Workspace workspace(conv3x3_workspace(p));
    require_success(launch_conv3x3(p, workspace.data(), nullptr));
  });
}
