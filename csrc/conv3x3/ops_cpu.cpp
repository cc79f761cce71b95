// sr_kernels::conv3x3 on the CPU.
#include "common/cpu_isa.h"
#include "conv3x3/operators.h"

namespace sr_kernels {
namespace {

struct Cpu {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };
  static void run(const Conv3x3Params& p, const Tensor&) {
    SR_KERNELS_CALL_CPU(conv3x3, p, torch_parallel);
  }
};

}  // namespace
}  // namespace sr_kernels

STABLE_TORCH_LIBRARY_IMPL(sr_kernels, CPU, m) {
  sr_kernels::Conv3x3Operators<sr_kernels::Cpu>::implement(m);
}
