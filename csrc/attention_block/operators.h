// The attention block's operators, for any device: checks, outputs, params. Backend says what a
// device adds to that: a Guard, made before anything else, and run(op, params, x).
#pragma once

#include "attention_block/arguments.h"
#include "torch_adapter.h"

namespace sr_kernels {

template <typename Backend>
struct AttentionBlockOperators {
  static std::tuple<Tensor, Tensor> grouped_attention_block(const Tensor& x, const Tensor& w_in_,
                                                            const std::optional<Tensor>& b_in_,
                                                            const Tensor& w_out_,
                                                            const std::optional<Tensor>& b_out_,
                                                            std::vector<int64_t> windows,
                                                            bool shifted, bool return_q) {
    [[maybe_unused]] const typename Backend::Guard guard(x);
    const Tensor w_in = dense(w_in_), w_out = dense(w_out_);
    const std::optional<Tensor> b_in = dense(b_in_), b_out = dense(b_out_);
    const AttentionBlockArguments arguments("grouped_attention_block", x, nullptr, w_in, b_in,
                                            w_out, b_out, windows, shifted);
    AttentionBlockParams p = arguments.params();
    Tensor y = new_feature_map(x, p.channels);
    Tensor q = return_q ? new_tensor(x, {p.batch, p.channels, p.height, p.width}) : no_gradient(x);
    p.y = feature_map(y);
    if (return_q) p.q = q.data_ptr();
    if (y.numel() > 0) Backend::run("grouped_attention_block", p, x);
    return {y, q};
  }

  static Tensor apply_grouped_attention_block(const Tensor& x, const Tensor& q_, const Tensor& w_v_,
                                              const std::optional<Tensor>& b_v_,
                                              const Tensor& w_out_,
                                              const std::optional<Tensor>& b_out_,
                                              std::vector<int64_t> windows, bool shifted) {
    [[maybe_unused]] const typename Backend::Guard guard(x);
    const Tensor q = dense(q_), w_v = dense(w_v_), w_out = dense(w_out_);
    const std::optional<Tensor> b_v = dense(b_v_), b_out = dense(b_out_);
    const AttentionBlockArguments arguments("apply_grouped_attention_block", x, &q, w_v, b_v, w_out,
                                            b_out, windows, shifted);
    AttentionBlockParams p = arguments.params();
    Tensor y = new_feature_map(x, p.channels);
    p.y = feature_map(y);
    if (y.numel() > 0) Backend::run("apply_grouped_attention_block", p, x);
    return y;
  }

  template <typename Library>
  static void implement(Library& m) {
    m.impl("grouped_attention_block", TORCH_BOX(&AttentionBlockOperators::grouped_attention_block));
    m.impl("apply_grouped_attention_block",
           TORCH_BOX(&AttentionBlockOperators::apply_grouped_attention_block));
  }
};

}  // namespace sr_kernels
