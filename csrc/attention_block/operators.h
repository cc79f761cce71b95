// The attention block's operators, for any device: checks, outputs, params. Backend says what a
// device adds to that: a Guard, made before anything else, and run(op, params, x).
#pragma once

#include "attention_block/arguments.h"
#include "torch_adapter.h"

namespace sr_kernels {

template <typename Backend>
struct AttentionBlockOperators {
  // q absent: the scores are computed here and, where `new_q` is a tensor, their queries written
  // to it.
  static Tensor run(const char* op, const std::optional<Tensor>& out, const Tensor& x,
                    const std::optional<Tensor>& q_, const std::optional<Tensor>& new_q,
                    const Tensor& w_in_, const std::optional<Tensor>& b_in_, const Tensor& w_out_,
                    const std::optional<Tensor>& b_out_, const std::vector<int64_t>& windows,
                    bool shifted) {
    [[maybe_unused]] const typename Backend::Guard guard(x);
    const Tensor w_in = dense(w_in_), w_out = dense(w_out_);
    const std::optional<Tensor> b_in = dense(b_in_), b_out = dense(b_out_), q = dense(q_);
    const AttentionBlockArguments arguments(op, x, q.has_value() ? &*q : nullptr, w_in, b_in, w_out,
                                            b_out, windows, shifted);
    AttentionBlockParams p = arguments.params();
    Tensor y = output_or_new(out, x, p.channels);
    p.y = feature_map(y);
    if (new_q.has_value()) {
      require_shape(*new_q, {p.batch, p.channels, p.height, p.width}, "q");
      require_like(*new_q, x, "q", "x");
      require(new_q->is_contiguous(), op, ": q must be contiguous");
      p.q = new_q->data_ptr();
    }
    if (y.numel() > 0) Backend::run(op, p, x);
    return y;
  }

  static std::tuple<Tensor, Tensor> grouped_attention_block(const Tensor& x, const Tensor& w_in,
                                                            const std::optional<Tensor>& b_in,
                                                            const Tensor& w_out,
                                                            const std::optional<Tensor>& b_out,
                                                            std::vector<int64_t> windows,
                                                            bool shifted, bool return_q) {
    require_feature_map(x, "x");
    std::optional<Tensor> q;
    if (return_q) q = new_tensor(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
    Tensor y = run("grouped_attention_block", std::nullopt, x, std::nullopt, q, w_in, b_in, w_out,
                   b_out, windows, shifted);
    return {y, return_q ? *q : no_gradient(x)};
  }

  static void grouped_attention_block_out(const Tensor& x, const Tensor& w_in,
                                          const std::optional<Tensor>& b_in, const Tensor& w_out,
                                          const std::optional<Tensor>& b_out,
                                          std::vector<int64_t> windows, bool shifted,
                                          const Tensor& out, const std::optional<Tensor>& q) {
    run("grouped_attention_block_out", out, x, std::nullopt, q, w_in, b_in, w_out, b_out, windows,
        shifted);
  }

  static Tensor apply_grouped_attention_block(const Tensor& x, const Tensor& q, const Tensor& w_v,
                                              const std::optional<Tensor>& b_v, const Tensor& w_out,
                                              const std::optional<Tensor>& b_out,
                                              std::vector<int64_t> windows, bool shifted) {
    return run("apply_grouped_attention_block", std::nullopt, x, q, std::nullopt, w_v, b_v, w_out,
               b_out, windows, shifted);
  }

  static void apply_grouped_attention_block_out(const Tensor& x, const Tensor& q, const Tensor& w_v,
                                                const std::optional<Tensor>& b_v,
                                                const Tensor& w_out,
                                                const std::optional<Tensor>& b_out,
                                                std::vector<int64_t> windows, bool shifted,
                                                const Tensor& out) {
    run("apply_grouped_attention_block_out", out, x, q, std::nullopt, w_v, b_v, w_out, b_out,
        windows, shifted);
  }

  template <typename Library>
  static void implement(Library& m) {
    m.impl("grouped_attention_block", TORCH_BOX(&AttentionBlockOperators::grouped_attention_block));
    m.impl("apply_grouped_attention_block",
           TORCH_BOX(&AttentionBlockOperators::apply_grouped_attention_block));
    m.impl("grouped_attention_block_out",
           TORCH_BOX(&AttentionBlockOperators::grouped_attention_block_out));
    m.impl("apply_grouped_attention_block_out",
           TORCH_BOX(&AttentionBlockOperators::apply_grouped_attention_block_out));
  }
};

}  // namespace sr_kernels
