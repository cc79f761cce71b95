// The channel moments' CUDA launches, with the arguments of the operators of csrc/library.cpp, then
// the arrays for the results.
#include "arrays.h"
#include "channel_moments/launch.cu"

using namespace sr_kernels;

namespace {

using Object = py::object;

ChannelMomentsParams moments_params(int kind, const Array& x, const Array& mean) {
  ChannelMomentsParams p{};
  p.kind = static_cast<ScalarKind>(kind);
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.height = x.size(2);
  p.width = x.size(3);
  p.x = x.map();
  p.mean = static_cast<double*>(mean.data());
  return p;
}

template <typename Params>
void run(const Params& p) {
  Workspace workspace(channel_moments_workspace(p));
  require_success(launch_channel_moments(p, workspace.data(), nullptr));
}

}  // namespace

PYBIND11_MODULE(channel_moments, m) {
  m.def("set_schedule", &cuda_on_cpu::set_schedule);
  m.def("shared_bytes", [] {
    py::dict bytes;
    bytes["channel_products_kernel"] = ChannelProductTile::kSharedBytes;
    bytes["channel_moments_gradient_kernel"] = ChannelMomentsGradientTile::kSharedBytes;
    return bytes;
  });
  m.def("channel_moments", [](int kind, Object x_, Object mean_, Object covariance_) {
    const Array x(x_), mean(mean_), covariance(covariance_);
    ChannelMomentsParams p = moments_params(kind, x, mean);
    p.covariance = static_cast<double*>(covariance.data());
    run(p);
  });
  m.def("channel_moments_backward", [](int kind, Object mean_grad_, Object covariance_grad_,
                                       Object x_, Object mean_, Object dx_) {
    const Array mean_grad(mean_grad_), covariance_grad(covariance_grad_), x(x_), mean(mean_),
        dx(dx_);
    ChannelMomentsBackwardParams p{};
    p.forward = moments_params(kind, x, mean);
    p.mean_gradient = static_cast<const double*>(mean_grad.data());
    p.covariance_gradient = static_cast<const double*>(covariance_grad.data());
    p.dx = dx.map();
    run(p);
  });
}
