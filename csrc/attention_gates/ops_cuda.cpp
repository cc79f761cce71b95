// The attention gates' operators on CUDA: device, stream, workspace.
#include "attention_gates/launch.h"
#include "attention_gates/operators.h"

namespace sr_kernels {
namespace {

struct Cuda {
  using Guard = CudaGuard;
  static void run(const PixelAttentionParams& p, const Tensor& x) {
    require_launched("pixel_attention", launch_gate(p, current_cuda_stream(x)));
  }
  static void run(const PixelAttentionBackwardParams& p, const Tensor& x) {
    run("pixel_attention_backward", p, x);
  }
  static void run(const SpatialAttentionParams& p, const Tensor& x) {
    run("spatial_attention", p, x);
  }
  static void run(const SpatialAttentionBackwardParams& p, const Tensor& x) {
    run("spatial_attention_backward", p, x);
  }
  static void run(const ChannelAttentionParams& p, const Tensor& x) {
    const OnChipShares shares = shares_on_chip(p);
    const CudaWorkspace workspace(x, gate_workspace(p, shares));
    require_launched("channel_attention",
                     launch_gate(p, shares, workspace.data(), current_cuda_stream(x)));
  }
  static void run(const ChannelAttentionBackwardParams& p, const Tensor& x) {
    run("channel_attention_backward", p, x);
  }
  static void run(const GatedConvParams& p, const Tensor& x) {
    require_launched("gated_conv1x1", launch_gate(p, current_cuda_stream(x)));
  }
  static void run(const GatedConvBackwardParams& p, const Tensor& x) {
    run("gated_conv1x1_backward", p, x);
  }

 private:
  template <typename Params>
  static void run(const char* op, const Params& p, const Tensor& x) {
    const CudaWorkspace workspace(x, gate_workspace(p));
    require_launched(op, launch_gate(p, workspace.data(), current_cuda_stream(x)));
  }
};

}  // namespace
}  // namespace sr_kernels

STABLE_TORCH_LIBRARY_IMPL(sr_kernels, CUDA, m) {
  sr_kernels::AttentionGateOperators<sr_kernels::Cuda>::implement(m);
}
