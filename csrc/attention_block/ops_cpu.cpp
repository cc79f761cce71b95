// sr_kernels::grouped_attention_block and apply_grouped_attention_block on the CPU.
#include "attention_block/arguments.h"
#include "common/cpu_isa.h"
#include "torch_adapter.h"

namespace sr_kernels {
namespace {

std::tuple<Tensor, Tensor> grouped_attention_block_cpu(const Tensor& x, const Tensor& w_in_,
                                                       const std::optional<Tensor>& b_in_,
                                                       const Tensor& w_out_,
                                                       const std::optional<Tensor>& b_out_,
                                                       std::vector<int64_t> windows, bool shifted,
                                                       bool return_q) {
  const Tensor w_in = dense(w_in_), w_out = dense(w_out_);
  const std::optional<Tensor> b_in = dense(b_in_), b_out = dense(b_out_);
  const AttentionBlockArguments arguments("grouped_attention_block", x, nullptr, w_in, b_in, w_out,
                                          b_out, windows, shifted);
  AttentionBlockParams p = arguments.params();
  Tensor y = new_feature_map(x, p.channels);
  Tensor q = return_q ? new_tensor(x, {p.batch, p.channels, p.height, p.width}) : no_gradient(x);
  p.y = feature_map(y);
  if (return_q) p.q = q.data_ptr();
  if (y.numel() > 0) SR_KERNELS_CALL_CPU(attention_block, p, torch_parallel);
  return {y, q};
}

Tensor apply_grouped_attention_block_cpu(const Tensor& x, const Tensor& q_, const Tensor& w_v_,
                                         const std::optional<Tensor>& b_v_, const Tensor& w_out_,
                                         const std::optional<Tensor>& b_out_,
                                         std::vector<int64_t> windows, bool shifted) {
  const Tensor q = dense(q_), w_v = dense(w_v_), w_out = dense(w_out_);
  const std::optional<Tensor> b_v = dense(b_v_), b_out = dense(b_out_);
  const AttentionBlockArguments arguments("apply_grouped_attention_block", x, &q, w_v, b_v, w_out,
                                          b_out, windows, shifted);
  AttentionBlockParams p = arguments.params();
  Tensor y = new_feature_map(x, p.channels);
  p.y = feature_map(y);
  if (y.numel() > 0) SR_KERNELS_CALL_CPU(attention_block, p, torch_parallel);
  return y;
}

}  // namespace
}  // namespace sr_kernels

STABLE_TORCH_LIBRARY_IMPL(sr_kernels, CPU, m) {
  m.impl("grouped_attention_block", TORCH_BOX(&sr_kernels::grouped_attention_block_cpu));
  m.impl("apply_grouped_attention_block",
         TORCH_BOX(&sr_kernels::apply_grouped_attention_block_cpu));
}
