// sr_kernels::grouped_attention_block and apply_grouped_attention_block on CUDA: device, stream,
// workspace.
#include "attention_block/launch.h"
#include "attention_block/operators.h"

namespace sr_kernels {
namespace {

struct Cuda {
  using Guard = CudaGuard;
  static void run(const char* op, const AttentionBlockParams& p, const Tensor& x) {
    const CudaWorkspace workspace(x, attention_block_workspace(p));
    require_launched(op, launch_attention_block(p, workspace.data(), current_cuda_stream(x)));
  }
};

}  // namespace
}  // namespace sr_kernels

STABLE_TORCH_LIBRARY_IMPL(sr_kernels, CUDA, m) {
  sr_kernels::AttentionBlockOperators<sr_kernels::Cuda>::implement(m);
}
