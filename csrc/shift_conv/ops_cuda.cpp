// sr_kernels::shift_conv2d, shift_conv_block and their backwards on CUDA: device, stream,
// workspace.
#include "shift_conv/launch.h"
#include "shift_conv/operators.h"

namespace sr_kernels {
namespace {

struct Cuda {
  using Guard = CudaGuard;
  static void run(const ShiftConvParams& p, const Tensor& x) {
    require_launched("shift_conv2d", launch_shift_conv2d(p, current_cuda_stream(x)));
  }
  static void run(const ShiftConvBackwardParams& p, const Tensor& x) {
    const CudaWorkspace workspace(x, shift_conv2d_backward_workspace(p));
    require_launched("shift_conv2d_backward",
                     launch_shift_conv2d_backward(p, workspace.data(), current_cuda_stream(x)));
  }
  static void run(const ShiftConvBlockParams& p, const Tensor& x) {
    const CudaWorkspace workspace(x, shift_conv_block_workspace(p));
    require_launched("shift_conv_block",
                     launch_shift_conv_block(p, workspace.data(), current_cuda_stream(x)));
  }
  static void run(const ShiftConvBlockBackwardParams& p, const Tensor& x) {
    const CudaWorkspace workspace(x, shift_conv_block_backward_workspace(p));
    require_launched("shift_conv_block_backward",
                     launch_shift_conv_block_backward(p, workspace.data(), current_cuda_stream(x)));
  }
};

}  // namespace
}  // namespace sr_kernels

STABLE_TORCH_LIBRARY_IMPL(sr_kernels, CUDA, m) {
  sr_kernels::ShiftConvOperators<sr_kernels::Cuda>::implement(m);
}
