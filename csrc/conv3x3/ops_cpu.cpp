// sr_kernels::conv3x3 on the CPU.
#include "common/cpu_isa.h"
#include "conv3x3/arguments.h"
#include "torch_adapter.h"

namespace sr_kernels {
namespace {

Tensor conv3x3_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias_in,
                   const std::optional<Tensor>& skip, int64_t activation, double negative_slope) {
  const std::optional<Tensor> bias = dense(bias_in);
  Conv3x3Params p = conv3x3_params(x, weight, bias, skip, activation, negative_slope);
  Tensor y = new_feature_map(x, p.c_out);
  p.y = feature_map(y);
  if (y.numel() > 0) SR_KERNELS_CALL_CPU(conv3x3, p, torch_parallel);
  return y;
}

}  // namespace
}  // namespace sr_kernels

STABLE_TORCH_LIBRARY_IMPL(sr_kernels, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&sr_kernels::conv3x3_cpu));
}
