// sr_kernels::conv3x3 on CUDA: device, stream, workspace.
#include "conv3x3/launch.h"
#include "conv3x3/operators.h"

namespace sr_kernels {
namespace {

struct Cuda {
  using Guard = CudaGuard;
  static void run(const Conv3x3Params& p, const Tensor& x) {
    const CudaWorkspace workspace(x, conv3x3_workspace(p));
    require_launched("conv3x3", launch_conv3x3(p, workspace.data(), current_cuda_stream(x)));
  }
};

}  // namespace
}  // namespace sr_kernels

STABLE_TORCH_LIBRARY_IMPL(sr_kernels, CUDA, m) {
  sr_kernels::Conv3x3Operators<sr_kernels::Cuda>::implement(m);
}
