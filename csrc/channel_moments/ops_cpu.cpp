// sr_kernels::channel_moments and its backward on the CPU.
#include "channel_moments/operators.h"
#include "common/cpu_isa.h"

namespace sr_kernels {
namespace {

struct Cpu {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };
  static void run(const ChannelMomentsParams& p, const Tensor&) {
    SR_KERNELS_CALL_CPU(channel_moments, p, torch_parallel);
  }
  static void run(const ChannelMomentsBackwardParams& p, const Tensor&) {
    SR_KERNELS_CALL_CPU(channel_moments_backward, p, torch_parallel);
  }
};

}  // namespace
}  // namespace sr_kernels

STABLE_TORCH_LIBRARY_IMPL(sr_kernels, CPU, m) {
  sr_kernels::ChannelMomentsOperators<sr_kernels::Cpu>::implement(m);
  sr_kernels::ChannelMomentsOperators<sr_kernels::Cpu>::implement_for_cpu(m);
}
