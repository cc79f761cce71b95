// The attention gates' operators on the CPU.
#include "attention_gates/operators.h"
#include "common/cpu_isa.h"

namespace sr_kernels {
namespace {

struct Cpu {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };
  static void run(const PixelAttentionParams& p, const Tensor&) {
    SR_KERNELS_CALL_CPU(pixel_attention, p, torch_parallel);
  }
  static void run(const PixelAttentionBackwardParams& p, const Tensor&) {
    SR_KERNELS_CALL_CPU(pixel_attention_backward, p, torch_parallel);
  }
  static void run(SpatialAttentionParams& p, const Tensor& x) {
    Tensor workspace = spatial_workspace(x, SpatialAttentionParams::kForwardPlanes);
    p.workspace = workspace.data_ptr();
    SR_KERNELS_CALL_CPU(spatial_attention, p, torch_parallel);
  }
  static void run(SpatialAttentionBackwardParams& p, const Tensor& x) {
    Tensor workspace = spatial_workspace(x, SpatialAttentionParams::kBackwardPlanes);
    p.forward.workspace = workspace.data_ptr();
    SR_KERNELS_CALL_CPU(spatial_attention_backward, p, torch_parallel);
  }
  static void run(const ChannelAttentionParams& p, const Tensor&) {
    SR_KERNELS_CALL_CPU(channel_attention, p, torch_parallel);
  }
  static void run(const ChannelAttentionBackwardParams& p, const Tensor&) {
    SR_KERNELS_CALL_CPU(channel_attention_backward, p, torch_parallel);
  }
  static void run(const GatedConvParams& p, const Tensor&) {
    SR_KERNELS_CALL_CPU(gated_conv1x1, p, torch_parallel);
  }
  static void run(const GatedConvBackwardParams& p, const Tensor&) {
    SR_KERNELS_CALL_CPU(gated_conv1x1_backward, p, torch_parallel);
  }
};

}  // namespace
}  // namespace sr_kernels

STABLE_TORCH_LIBRARY_IMPL(sr_kernels, CPU, m) {
  sr_kernels::AttentionGateOperators<sr_kernels::Cpu>::implement(m);
}
