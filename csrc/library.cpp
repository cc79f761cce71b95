// Every operator's schema, in one place, and the choice of the CPU instruction set.
//
// Conventions. x, q, k, v, ... are (N, C, H, W). A *_backward operator takes the gradient of the
// output first, then what the forward took and, where that saves work, what it returned, then
// `need_*` flags; a gradient that was not asked for comes back as an empty tensor of shape (0,).
// Enumerations travel as integers (shift_pattern.h, activation.h): strings would be copied at every
// call. A *_out operator, for inference, writes into a feature map that shares no memory with what
// it reads.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "common/cpu_isa.h"
#include "torch_adapter.h"

STABLE_TORCH_LIBRARY(sr_kernels, m) {
  // ------------------------------------------------------------ shift convolution
  m.def(
      "shift_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int activation, "
      "float negative_slope, int pattern, int groups) -> Tensor");
  m.def(
      "shift_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, int activation, "
      "float negative_slope, int pattern, int groups, bool need_x, bool need_weight, "
      "bool need_bias) -> (Tensor, Tensor, Tensor)");
  m.def(
      "shift_conv_block(Tensor x, Tensor w0, Tensor? b0, Tensor w1, Tensor? b1, int activation, "
      "float negative_slope, bool residual, int pattern, int groups) -> Tensor");
  m.def(
      "shift_conv_block_out(Tensor x, Tensor w0, Tensor? b0, Tensor w1, Tensor? b1, "
      "int activation, float negative_slope, bool residual, int pattern, int groups, "
      "Tensor(a!) out) -> ()");
  m.def(
      "shift_conv_block_backward(Tensor grad, Tensor x, Tensor w0, Tensor? b0, Tensor w1, "
      "int activation, float negative_slope, bool residual, int pattern, int groups, "
      "bool need_x, bool need_w0, bool need_b0, bool need_w1, bool need_b1) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // ------------------------------------------------------------ window attention
  // k absent means k = q. lse is the log-sum-exp of each score row, (N, num_heads, H, W).
  m.def(
      "window_attention(Tensor q, Tensor? k, Tensor v, Tensor? bias, int window_h, int window_w, "
      "int shift_h, int shift_w, int num_heads, float scale, bool mask) -> (Tensor, Tensor)");
  m.def(
      "apply_window_scores(Tensor q, Tensor? k, Tensor lse, Tensor v, Tensor? bias, int window_h, "
      "int window_w, int shift_h, int shift_w, int num_heads, float scale, bool mask) -> Tensor");
  m.def(
      "window_attention_backward(Tensor grad, Tensor q, Tensor? k, Tensor lse, Tensor v, "
      "Tensor? bias, int window_h, int window_w, int shift_h, int shift_w, int num_heads, "
      "float scale, bool mask, bool need_q, bool need_k, bool need_v, bool need_bias) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  // qv is (N, 2C, H, W), q0 v0 q1 v1 ...; lse is (N, len(windows), H, W).
  m.def("grouped_window_attention(Tensor qv, int[] windows, bool shifted) -> (Tensor, Tensor)");
  m.def(
      "grouped_window_attention_backward(Tensor grad, Tensor qv, Tensor out, Tensor lse, "
      "int[] windows, bool shifted) -> Tensor");
  m.def(
      "apply_grouped_window_scores(Tensor qv, Tensor lse, Tensor v, int[] windows, bool shifted) "
      "-> Tensor");
  m.def(
      "apply_grouped_window_scores_backward(Tensor grad, Tensor qv, Tensor lse, Tensor v, "
      "Tensor out, int[] windows, bool shifted, bool need_qv, bool need_v) -> (Tensor, Tensor)");
  // The CPU alone. reuse_v and reuse_out went into and came out of apply_grouped_window_scores,
  // reuse_grad is the gradient of reuse_out: what flows from there into qv is in the result.
  m.def(
      "grouped_window_attention_joint_backward(Tensor grad, Tensor qv, Tensor out, Tensor lse, "
      "Tensor reuse_grad, Tensor reuse_v, Tensor reuse_out, int[] windows, bool shifted) "
      "-> Tensor");

  // ------------------------------------------------------------ attention block
  // Inference only. q is (N, C, H, W), the queries of all groups, or (0,) where return_q is false.
  m.def(
      "grouped_attention_block(Tensor x, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out, "
      "int[] windows, bool shifted, bool return_q) -> (Tensor, Tensor)");
  m.def(
      "apply_grouped_attention_block(Tensor x, Tensor q, Tensor w_v, Tensor? b_v, Tensor w_out, "
      "Tensor? b_out, int[] windows, bool shifted) -> Tensor");
  m.def(
      "grouped_attention_block_out(Tensor x, Tensor w_in, Tensor? b_in, Tensor w_out, "
      "Tensor? b_out, int[] windows, bool shifted, Tensor(a!) out, Tensor(b!)? q) -> ()");
  m.def(
      "apply_grouped_attention_block_out(Tensor x, Tensor q, Tensor w_v, Tensor? b_v, "
      "Tensor w_out, Tensor? b_out, int[] windows, bool shifted, Tensor(a!) out) -> ()");

  // ------------------------------------------------------------ linear attention block
  // Inference only, on the CPU alone.
  m.def(
      "linear_attention_block(Tensor x, Tensor w0, Tensor? b0, Tensor w_depth, Tensor w1, Tensor? "
      "b1, "
      "Tensor w_qkv, Tensor? b_qkv, Tensor w_out, Tensor? b_out, int window_h, int window_w, "
      "int shift_h, int shift_w, int num_heads, float scale) -> Tensor");

  // ------------------------------------------------------------ 3x3 convolution
  // Inference only.
  m.def(
      "conv3x3(Tensor x, Tensor weight, Tensor? bias, Tensor? skip, int activation, "
      "float negative_slope) -> Tensor");

  // ------------------------------------------------------------ channel moments
  // mean (C) and covariance (C, C) of the batch's pixels, float64.
  m.def("channel_moments(Tensor x) -> (Tensor, Tensor)");
  m.def(
      "channel_moments_backward(Tensor mean_grad, Tensor covariance_grad, Tensor x, Tensor mean) "
      "-> Tensor");
  // The CPU alone. The sum of that and of gradients that reached x by other ways.
  m.def(
      "channel_moments_joint_backward(Tensor mean_grad, Tensor covariance_grad, Tensor x, "
      "Tensor mean, Tensor other_grad, Tensor? another_grad) -> Tensor");

  // ------------------------------------------------------------ attention gates
  m.def("pixel_attention(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "pixel_attention_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, bool need_x, "
      "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
  m.def("spatial_attention(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "spatial_attention_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, "
      "bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
  m.def(
      "pixel_spatial_attention(Tensor x, Tensor pixel_weight, Tensor? pixel_bias, "
      "Tensor spatial_weight, Tensor? spatial_bias) -> Tensor");
  m.def(
      "pixel_spatial_attention_backward(Tensor grad, Tensor x, Tensor pixel_weight, "
      "Tensor? pixel_bias, Tensor spatial_weight, Tensor? spatial_bias, bool need_x, "
      "bool need_pixel_weight, bool need_pixel_bias, bool need_spatial_weight, "
      "bool need_spatial_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // statistic: 0 mean, 1 contrast (mean + population standard deviation). gate is (N, C, 1, 1).
  m.def(
      "channel_gate(Tensor x, Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, "
      "int statistic) -> Tensor");
  m.def(
      "channel_gate_backward(Tensor grad, Tensor x, Tensor w_down, Tensor? b_down, Tensor w_up, "
      "Tensor? b_up, int statistic, bool need_x, bool need_w_down, bool need_b_down, "
      "bool need_w_up, bool need_b_up) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "channel_attention(Tensor x, Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, "
      "int statistic) -> Tensor");
  m.def(
      "channel_attention_backward(Tensor grad, Tensor x, Tensor w_down, Tensor? b_down, "
      "Tensor w_up, Tensor? b_up, int statistic, bool need_x, bool need_w_down, "
      "bool need_b_down, bool need_w_up, bool need_b_up) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gated_conv1x1(Tensor x, Tensor gate, Tensor weight, Tensor? bias, Tensor? residual) "
      "-> Tensor");
  m.def(
      "gated_conv1x1_backward(Tensor grad, Tensor x, Tensor gate, Tensor weight, bool need_x, "
      "bool need_gate, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)");
}

namespace sr_kernels {
namespace {

CpuIsa best_cpu_isa() {
#if defined(SR_KERNELS_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return CpuIsa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return CpuIsa::kAvx2;
#endif
  return CpuIsa::kPortable;
}

CpuIsa decide_cpu_isa() {
  const CpuIsa best = best_cpu_isa();
  const char* wanted = std::getenv("SR_KERNELS_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  CpuIsa isa;
  if (std::strcmp(wanted, "portable") == 0)
    isa = CpuIsa::kPortable;
  else if (std::strcmp(wanted, "avx2") == 0)
    isa = CpuIsa::kAvx2;
  else if (std::strcmp(wanted, "avx512") == 0)
    isa = CpuIsa::kAvx512;
  else
    throw std::runtime_error(
        message("SR_KERNELS_CPU_ISA must be portable, avx2 or avx512, got '", wanted, "'"));
  require(static_cast<int>(isa) <= static_cast<int>(best), "SR_KERNELS_CPU_ISA=", wanted,
          ": this build or this processor does not have it");
  return isa;
}

}  // namespace

CpuIsa cpu_isa() {
  static const CpuIsa isa = decide_cpu_isa();
  return isa;
}

}  // namespace sr_kernels

// For sr_kernels.backends (through ctypes): 0 portable, 1 AVX2, 2 AVX-512, -1 a bad request.
extern "C" __attribute__((visibility("default"))) int sr_kernels_cpu_isa() {
  try {
    return static_cast<int>(sr_kernels::cpu_isa());
  } catch (const std::exception&) {
    return -1;
  }
}
