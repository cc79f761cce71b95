// The attention gates' CUDA launches, with the arguments of the operators of csrc/library.cpp, then
// the arrays for the results.
#include "arrays.h"
#include "attention_gates/launch.cu"

using namespace sr_kernels;

namespace {

using Object = py::object;

template <typename Params>
Params image_params(int kind, const Array& x) {
  Params p{};
  p.kind = static_cast<ScalarKind>(kind);
  p.batch = x.size(0);
  p.height = x.size(2);
  p.width = x.size(3);
  p.x = x.map();
  return p;
}

PixelAttentionParams pixel_params(int kind, const Array& x, const Array& weight,
                                  const Array& bias) {
  auto p = image_params<PixelAttentionParams>(kind, x);
  p.channels = x.size(1);
  p.weight = weight.data();
  p.bias = bias.data();
  return p;
}

SpatialAttentionParams spatial_params(int kind, const Array& x, const Array& pixel_weight,
                                      const Array& pixel_bias, const Array& weight,
                                      const Array& bias) {
  auto p = image_params<SpatialAttentionParams>(kind, x);
  p.channels = x.size(1);
  p.kernel = weight.size(2);
  p.pixel_weight = pixel_weight.data();
  p.pixel_bias = pixel_bias.data();
  p.weight = weight.data();
  p.bias = bias.data();
  return p;
}

ChannelAttentionParams channel_params(int kind, const Array& x, const Array& w_down,
                                      const Array& b_down, const Array& w_up, const Array& b_up,
                                      int statistic) {
  auto p = image_params<ChannelAttentionParams>(kind, x);
  p.channels = x.size(1);
  p.hidden = w_down.size(0);
  p.contrast = statistic == 1;
  p.w_down = w_down.data();
  p.b_down = b_down.data();
  p.w_up = w_up.data();
  p.b_up = b_up.data();
  return p;
}

GatedConvParams gated_params(int kind, const Array& x, const Array& gate, const Array& weight,
                             const Array& bias) {
  auto p = image_params<GatedConvParams>(kind, x);
  p.c_in = x.size(1);
  p.c_out = weight.size(0);
  p.gate = gate.data();
  p.weight = weight.data();
  p.bias = bias.data();
  return p;
}

template <typename Params>
void run(const Params& p) {
  Workspace workspace(gate_workspace(p));
  require_success(launch_gate(p, workspace.data(), nullptr));
}

void run(const ChannelAttentionParams& p) {
  const OnChipShares shares = shares_on_chip(p);
  Workspace workspace(gate_workspace(p, shares));
  require_success(launch_gate(p, shares, workspace.data(), nullptr));
}

void run_spatial_backward(SpatialAttentionBackwardParams p, const Array& grad, const Array& dx,
                          const Array* dpixel_weight, const Array* dpixel_bias,
                          const Array& dweight, const Array& dbias) {
  p.grad = grad.map();
  p.dx = dx.map();
  if (dpixel_weight != nullptr) p.dpixel_weight = dpixel_weight->data();
  if (dpixel_bias != nullptr) p.dpixel_bias = dpixel_bias->data();
  p.dweight = dweight.data();
  p.dbias = dbias.data();
  run(p);
}

template <bool kOfGate>
void channel_backward(int kind, Object grad_, Object x_, Object w_down_, Object b_down_,
                      Object w_up_, Object b_up_, int statistic, Object dx_, Object dw_down_,
                      Object db_down_, Object dw_up_, Object db_up_) {
  const Array grad(grad_), x(x_), w_down(w_down_), b_down(b_down_), w_up(w_up_), b_up(b_up_),
      dx(dx_), dw_down(dw_down_), db_down(db_down_), dw_up(dw_up_), db_up(db_up_);
  ChannelAttentionBackwardParams p{};
  p.forward = channel_params(kind, x, w_down, b_down, w_up, b_up, statistic);
  p.grad = grad.map();
  p.grad_of_gate = kOfGate;
  p.dx = dx.map();
  p.dw_down = dw_down.data();
  p.db_down = db_down.data();
  p.dw_up = dw_up.data();
  p.db_up = db_up.data();
  run(p);
}

}  // namespace

PYBIND11_MODULE(attention_gates, m) {
  m.def("set_schedule", &cuda_on_cpu::set_schedule);
  m.def("set_device", &cuda_on_cpu::set_device, py::arg("multiprocessors"), py::arg("shared_bytes"),
        py::arg("cooperative_error") = 0);
  m.def("launches",
        [] { return py::make_tuple(cuda_on_cpu::launches, cuda_on_cpu::cooperative_launches); });
  // The most of a block since it was last asked.
  m.def("shared_bytes", [] { return std::exchange(cuda_on_cpu::most_shared_bytes, 0); });
  m.def("questions", [] { return cuda_on_cpu::device.questions; });
  // (chunks, share, shared_bytes)
  m.def("on_chip_shares", [](int64_t batch, int64_t pixels, int channels, int hidden,
                             int element_bytes, int multiprocessors, int shared_bytes) {
    const OnChipShares found =
        on_chip_shares(batch, pixels, channels, hidden, element_bytes, multiprocessors,
                       [=](int bytes) { return std::min(4, shared_bytes / (bytes + 1024)); });
    return py::make_tuple(found.chunks, found.share, found.shared_bytes);
  });
  m.def("pixel_attention", [](int kind, Object x_, Object weight_, Object bias_, Object y_) {
    const Array x(x_), weight(weight_), bias(bias_), y(y_);
    PixelAttentionParams p = pixel_params(kind, x, weight, bias);
    p.y = y.map();
    require_success(launch_gate(p, nullptr));
  });
  m.def("pixel_attention_backward", [](int kind, Object grad_, Object x_, Object weight_,
                                       Object bias_, Object dx_, Object dweight_, Object dbias_) {
    const Array grad(grad_), x(x_), weight(weight_), bias(bias_), dx(dx_), dweight(dweight_),
        dbias(dbias_);
    PixelAttentionBackwardParams p{};
    p.forward = pixel_params(kind, x, weight, bias);
    p.grad = grad.map();
    p.dx = dx.map();
    p.dweight = dweight.data();
    p.dbias = dbias.data();
    run(p);
  });
  m.def("spatial_attention", [](int kind, Object x_, Object weight_, Object bias_, Object y_) {
    const Array x(x_), none{py::none()}, weight(weight_), bias(bias_), y(y_);
    SpatialAttentionParams p = spatial_params(kind, x, none, none, weight, bias);
    p.y = y.map();
    run(p);
  });
  m.def("spatial_attention_backward", [](int kind, Object grad_, Object x_, Object weight_,
                                         Object bias_, Object dx_, Object dweight_, Object dbias_) {
    const Array grad(grad_), x(x_), none{py::none()}, weight(weight_), bias(bias_), dx(dx_),
        dweight(dweight_), dbias(dbias_);
    SpatialAttentionBackwardParams p{};
    p.forward = spatial_params(kind, x, none, none, weight, bias);
    run_spatial_backward(p, grad, dx, nullptr, nullptr, dweight, dbias);
  });
  m.def("pixel_spatial_attention", [](int kind, Object x_, Object pixel_weight_, Object pixel_bias_,
                                      Object weight_, Object bias_, Object y_) {
    const Array x(x_), pixel_weight(pixel_weight_), pixel_bias(pixel_bias_), weight(weight_),
        bias(bias_), y(y_);
    SpatialAttentionParams p = spatial_params(kind, x, pixel_weight, pixel_bias, weight, bias);
    p.y = y.map();
    run(p);
  });
  m.def("pixel_spatial_attention_backward",
        [](int kind, Object grad_, Object x_, Object pixel_weight_, Object pixel_bias_,
           Object weight_, Object bias_, Object dx_, Object dpixel_weight_, Object dpixel_bias_,
           Object dweight_, Object dbias_) {
          const Array grad(grad_), x(x_), pixel_weight(pixel_weight_), pixel_bias(pixel_bias_),
              weight(weight_), bias(bias_), dx(dx_), dpixel_weight(dpixel_weight_),
              dpixel_bias(dpixel_bias_), dweight(dweight_), dbias(dbias_);
          SpatialAttentionBackwardParams p{};
          p.forward = spatial_params(kind, x, pixel_weight, pixel_bias, weight, bias);
          run_spatial_backward(p, grad, dx, &dpixel_weight, &dpixel_bias, dweight, dbias);
        });
  m.def("channel_gate", [](int kind, Object x_, Object w_down_, Object b_down_, Object w_up_,
                           Object b_up_, int statistic, Object gate_) {
    const Array x(x_), w_down(w_down_), b_down(b_down_), w_up(w_up_), b_up(b_up_), gate(gate_);
    ChannelAttentionParams p = channel_params(kind, x, w_down, b_down, w_up, b_up, statistic);
    p.gate = gate.data();
    run(p);
  });
  m.def("channel_gate_backward", &channel_backward<true>);
  m.def("channel_attention", [](int kind, Object x_, Object w_down_, Object b_down_, Object w_up_,
                                Object b_up_, int statistic, Object y_) {
    const Array x(x_), w_down(w_down_), b_down(b_down_), w_up(w_up_), b_up(b_up_), y(y_);
    ChannelAttentionParams p = channel_params(kind, x, w_down, b_down, w_up, b_up, statistic);
    p.y = y.map();
    run(p);
  });
  m.def("channel_attention_backward", &channel_backward<false>);
  m.def("gated_conv1x1", [](int kind, Object x_, Object gate_, Object weight_, Object bias_,
                            Object residual_, Object y_) {
    const Array x(x_), gate(gate_), weight(weight_), bias(bias_), residual(residual_), y(y_);
    GatedConvParams p = gated_params(kind, x, gate, weight, bias);
    p.residual = residual.map();
    p.y = y.map();
    require_success(launch_gate(p, nullptr));
  });
  m.def("gated_conv1x1_backward",
        [](int kind, Object grad_, Object x_, Object gate_, Object weight_, Object dx_,
           Object dgate_, Object dweight_, Object dbias_) {
          const Array grad(grad_), x(x_), gate(gate_), weight(weight_), none{py::none()}, dx(dx_),
              dgate(dgate_), dweight(dweight_), dbias(dbias_);
          GatedConvBackwardParams p{};
          p.forward = gated_params(kind, x, gate, weight, none);
          p.grad = grad.map();
          p.dx = dx.map();
          p.dgate = dgate.data();
          p.dweight = dweight.data();
          p.dbias = dbias.data();
          run(p);
        });
}
