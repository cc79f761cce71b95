// sr_kernels::shift_conv2d on CUDA: params, device guard and stream.
#include <torch/csrc/stable/accelerator.h>

#include "shift_conv/arguments.h"
#include "shift_conv/launch.h"
#include "torch_adapter.h"

namespace sr_kernels {
namespace {

Tensor shift_conv2d_cuda(const Tensor& x, const Tensor& weight_in,
                         const std::optional<Tensor>& bias_in,
                         const std::optional<Tensor>& residual, int64_t activation,
                         double negative_slope, int64_t pattern, int64_t groups) {
  const Tensor weight = dense(weight_in);
  const std::optional<Tensor> bias = dense(bias_in);
  ShiftConvParams p = conv_params("shift_conv2d", x, weight, bias, residual, activation,
                                  negative_slope, pattern, groups);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = new_feature_map(x, p.c_out);
  p.y = feature_map(y);
  if (y.numel() == 0) return y;
  const char* error = launch_shift_conv2d(p, current_cuda_stream(x));
  require(error == nullptr, "shift_conv2d: ", error == nullptr ? "" : error);
  return y;
}

}  // namespace
}  // namespace sr_kernels

STABLE_TORCH_LIBRARY_IMPL(sr_kernels, CUDA, m) {
  m.impl("shift_conv2d", TORCH_BOX(&sr_kernels::shift_conv2d_cuda));
}
