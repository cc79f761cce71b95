// sr_kernels::window_attention, grouped_window_attention, the reuse of their scores and their
// backwards on CUDA: device, stream, workspace.
#include "window_attention/launch.h"
#include "window_attention/operators.h"

namespace sr_kernels {
namespace {

struct Cuda {
  using Guard = CudaGuard;
  static void run(const char* op, const std::vector<WindowAttentionParams>& groups, bool reuse,
                  const Tensor& out) {
    require_launched(op, launch_window_attention(groups.data(), static_cast<int64_t>(groups.size()),
                                                 reuse, current_cuda_stream(out)));
  }
  static void run(const char* op, const std::vector<WindowAttentionBackwardParams>& groups,
                  const Tensor& grad) {
    const int64_t count = static_cast<int64_t>(groups.size());
    const CudaWorkspace workspace(grad, window_attention_backward_workspace(groups.data(), count));
    require_launched(op, launch_window_attention_backward(groups.data(), count, workspace.data(),
                                                          current_cuda_stream(grad)));
  }
};

}  // namespace
}  // namespace sr_kernels

STABLE_TORCH_LIBRARY_IMPL(sr_kernels, CUDA, m) {
  sr_kernels::WindowAttentionOperators<sr_kernels::Cuda>::implement(m);
}
