// sr_kernels::channel_moments and its backward on CUDA: device, stream, workspace.
#include "channel_moments/launch.h"
#include "channel_moments/operators.h"

namespace sr_kernels {
namespace {

struct Cuda {
  using Guard = CudaGuard;
  static void run(const ChannelMomentsParams& p, const Tensor& x) { run("channel_moments", p, x); }
  static void run(const ChannelMomentsBackwardParams& p, const Tensor& x) {
    run("channel_moments_backward", p, x);
  }

 private:
  template <typename Params>
  static void run(const char* op, const Params& p, const Tensor& x) {
    const CudaWorkspace workspace(x, channel_moments_workspace(p));
    require_launched(op, launch_channel_moments(p, workspace.data(), current_cuda_stream(x)));
  }
};

}  // namespace
}  // namespace sr_kernels

STABLE_TORCH_LIBRARY_IMPL(sr_kernels, CUDA, m) {
  sr_kernels::ChannelMomentsOperators<sr_kernels::Cuda>::implement(m);
}
