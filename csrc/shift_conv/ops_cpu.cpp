// sr_kernels::shift_conv2d, shift_conv_block and their backwards on the CPU.
#include "common/cpu_isa.h"
#include "shift_conv/operators.h"

namespace sr_kernels {
namespace {

struct Cpu {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };
  static void run(const ShiftConvParams& p, const Tensor&) {
    SR_KERNELS_CALL_CPU(shift_conv2d, p, torch_parallel);
  }
  static void run(const ShiftConvBackwardParams& p, const Tensor&) {
    SR_KERNELS_CALL_CPU(shift_conv2d_backward, p, torch_parallel);
  }
  static void run(const ShiftConvBlockParams& p, const Tensor&) {
    SR_KERNELS_CALL_CPU(shift_conv_block, p, torch_parallel);
  }
  static void run(const ShiftConvBlockBackwardParams& p, const Tensor&) {
    SR_KERNELS_CALL_CPU(shift_conv_block_backward, p, torch_parallel);
  }
};

}  // namespace
}  // namespace sr_kernels

STABLE_TORCH_LIBRARY_IMPL(sr_kernels, CPU, m) {
  sr_kernels::ShiftConvOperators<sr_kernels::Cpu>::implement(m);
}
