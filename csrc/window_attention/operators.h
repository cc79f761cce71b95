// Window attention's operators, for any device: checks, outputs, params. Backend says what a device
// adds to that: a Guard, made before anything else, run(op, groups, reuse, out) and run(op,
// backward groups, grad).
#pragma once

#include "torch_adapter.h"
#include "window_attention/arguments.h"

namespace sr_kernels {

template <typename Backend>
struct WindowAttentionOperators {
  // ------------------------------------------------------------------ one window size, heads

  static std::tuple<Tensor, Tensor> window_attention(
      const Tensor& q, const std::optional<Tensor>& k, const Tensor& v,
      const std::optional<Tensor>& bias_in, int64_t window_h, int64_t window_w, int64_t shift_h,
      int64_t shift_w, int64_t num_heads, double scale, bool mask) {
    [[maybe_unused]] const typename Backend::Guard guard(q);
    const std::optional<Tensor> bias = dense(bias_in);
    WindowAttentionParams p = window_params("window_attention", q, k, v, bias, window_h, window_w,
                                            shift_h, shift_w, num_heads, scale, mask);
    Tensor out = new_feature_map(v, v.size(1));
    Tensor lse = new_lse(q, num_heads);
    p.out = feature_map(out);
    p.lse = feature_map(lse);
    if (out.numel() > 0) Backend::run("window_attention", {p}, false, out);
    return {out, lse};
  }

  static Tensor apply_window_scores(const Tensor& q, const std::optional<Tensor>& k,
                                    const Tensor& lse, const Tensor& v,
                                    const std::optional<Tensor>& bias_in, int64_t window_h,
                                    int64_t window_w, int64_t shift_h, int64_t shift_w,
                                    int64_t num_heads, double scale, bool mask) {
    [[maybe_unused]] const typename Backend::Guard guard(q);
    const std::optional<Tensor> bias = dense(bias_in);
    WindowAttentionParams p = window_params("apply_window_scores", q, k, v, bias, window_h,
                                            window_w, shift_h, shift_w, num_heads, scale, mask);
    check_lse(lse, q, num_heads);
    Tensor out = new_feature_map(v, v.size(1));
    p.out = feature_map(out);
    p.lse = feature_map(lse);
    if (out.numel() > 0) Backend::run("apply_window_scores", {p}, true, out);
    return out;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> window_attention_backward(
      const Tensor& grad, const Tensor& q, const std::optional<Tensor>& k, const Tensor& lse,
      const Tensor& v, const std::optional<Tensor>& bias_in, int64_t window_h, int64_t window_w,
      int64_t shift_h, int64_t shift_w, int64_t num_heads, double scale, bool mask, bool need_q,
      bool need_k, bool need_v, bool need_bias) {
    [[maybe_unused]] const typename Backend::Guard guard(q);
    const std::optional<Tensor> bias = dense(bias_in);
    WindowAttentionBackwardParams p{};
    p.forward = window_params("window_attention_backward", q, k, v, bias, window_h, window_w,
                              shift_h, shift_w, num_heads, scale, mask);
    check_lse(lse, q, num_heads);
    require(!need_k || k.has_value(),
            "window_attention_backward: need_k is set, but k is absent (the keys are q)");
    require(!need_bias || bias.has_value(),
            "window_attention_backward: need_bias is set, but bias is absent");
    require_shape(grad, {v.size(0), v.size(1), v.size(2), v.size(3)}, "grad");
    require_like(grad, q, "grad", "q");
    p.grad = feature_map(grad);
    p.forward.lse = feature_map(lse);
    Tensor dq = need_q ? new_feature_map(q, q.size(1)) : no_gradient(q);
    Tensor dk = need_k ? new_feature_map(*k, q.size(1)) : no_gradient(q);
    Tensor dv = need_v ? new_feature_map(v, v.size(1)) : no_gradient(v);
    Tensor dbias =
        need_bias ? new_tensor(q, {p.forward.geometry.bias_rows(), num_heads}) : no_gradient(q);
    if (need_q) p.dq = feature_map(dq);
    if (need_k) p.dk = feature_map(dk);
    if (need_v) p.dv = feature_map(dv);
    if (need_bias) p.dbias = dbias.data_ptr();
    if (grad.numel() > 0)
      Backend::run("window_attention_backward", {p}, grad);
    else if (need_bias)
      torch::stable::zero_(dbias);
    return {dq, dk, dv, dbias};
  }

  // ------------------------------------------------------------------ channel groups

  static std::tuple<Tensor, Tensor> grouped_window_attention(const Tensor& qv,
                                                             std::vector<int64_t> windows,
                                                             bool shifted) {
    [[maybe_unused]] const typename Backend::Guard guard(qv);
    std::vector<WindowAttentionParams> groups =
        group_params("grouped_window_attention", qv, nullptr, windows, shifted);
    Tensor out = new_feature_map(qv, qv.size(1) / 2);
    Tensor lse = new_lse(qv, static_cast<int64_t>(groups.size()));
    int64_t g = 0;
    for (WindowAttentionParams& p : groups) {
      p.out = from_channel(feature_map(out), out, g * p.d_v);
      p.lse = from_channel(feature_map(lse), lse, g);
      ++g;
    }
    if (out.numel() > 0) Backend::run("grouped_window_attention", groups, false, out);
    return {out, lse};
  }

  static Tensor apply_grouped_window_scores(const Tensor& qv, const Tensor& lse, const Tensor& v,
                                            std::vector<int64_t> windows, bool shifted) {
    [[maybe_unused]] const typename Backend::Guard guard(qv);
    std::vector<WindowAttentionParams> groups =
        group_params("apply_grouped_window_scores", qv, &v, windows, shifted);
    check_lse(lse, qv, static_cast<int64_t>(groups.size()));
    Tensor out = new_feature_map(v, v.size(1));
    int64_t g = 0;
    for (WindowAttentionParams& p : groups) {
      p.out = from_channel(feature_map(out), out, g * p.d_v);
      p.lse = from_channel(feature_map(lse), lse, g);
      ++g;
    }
    if (out.numel() > 0) Backend::run("apply_grouped_window_scores", groups, true, out);
    return out;
  }

  // Another use of the scores: its values, what it computed, the gradient of that.
  struct Reuse {
    const Tensor &v, &out, &grad;
  };

  // dqv and dv nullptr: not wanted. Values (and their gradients) are inside qv (dqv) if v is
  // nullptr. reuse: nullptr, or a use whose gradient of the scores joins this one's.
  static void run_grouped_backward(const char* op, const Tensor& grad, const Tensor& qv,
                                   const Tensor& lse, const Tensor* v, const Tensor& out,
                                   const std::vector<int64_t>& windows, bool shifted,
                                   const Tensor* dqv, const Tensor* dv,
                                   const Reuse* reuse = nullptr) {
    const std::vector<WindowAttentionParams> groups = group_params(op, qv, v, windows, shifted);
    const int64_t count = static_cast<int64_t>(groups.size());
    check_lse(lse, qv, count);
    const int64_t channels = v == nullptr ? qv.size(1) / 2 : v->size(1);
    const std::vector<int64_t> shape{qv.size(0), channels, qv.size(2), qv.size(3)};
    const auto check = [&](const Tensor& tensor, const char* name) {
      require_shape(tensor, shape, name);
      require_like(tensor, qv, name, "qv");
    };
    check(grad, "grad");
    check(out, "out");
    if (reuse != nullptr) {
      check(reuse->grad, "reuse_grad");
      check(reuse->v, "reuse_v");
      check(reuse->out, "reuse_out");
    }
    std::vector<WindowAttentionBackwardParams> backward;
    for (int64_t g = 0; g < count; ++g) {
      WindowAttentionBackwardParams p{};
      p.forward = groups[static_cast<size_t>(g)];
      p.forward.lse = from_channel(feature_map(lse), lse, g);
      const int64_t d = p.forward.d_qk, d_v = p.forward.d_v;
      const auto of_group = [&](const Tensor& tensor) {
        return from_channel(feature_map(tensor), tensor, g * d_v);
      };
      p.forward.out = of_group(out);
      p.grad = of_group(grad);
      if (reuse != nullptr) {
        p.reuse_grad = of_group(reuse->grad);
        p.reuse_v = of_group(reuse->v);
        p.reuse_out = of_group(reuse->out);
      }
      if (dqv != nullptr) p.dq = from_channel(feature_map(*dqv), *dqv, 2 * g * d);
      if (v == nullptr)
        p.dv = from_channel(feature_map(*dqv), *dqv, (2 * g + 1) * d);
      else if (dv != nullptr)
        p.dv = from_channel(feature_map(*dv), *dv, g * d_v);
      backward.push_back(p);
    }
    if (grad.numel() > 0) Backend::run(op, backward, grad);
  }

  static Tensor grouped_window_attention_backward(const Tensor& grad, const Tensor& qv,
                                                  const Tensor& out, const Tensor& lse,
                                                  std::vector<int64_t> windows, bool shifted) {
    [[maybe_unused]] const typename Backend::Guard guard(qv);
    require_feature_map(qv, "qv");
    Tensor dqv = new_feature_map(qv, qv.size(1));
    run_grouped_backward("grouped_window_attention_backward", grad, qv, lse, nullptr, out, windows,
                         shifted, &dqv, nullptr);
    return dqv;
  }

  static Tensor grouped_window_attention_joint_backward(
      const Tensor& grad, const Tensor& qv, const Tensor& out, const Tensor& lse,
      const Tensor& reuse_grad, const Tensor& reuse_v, const Tensor& reuse_out,
      std::vector<int64_t> windows, bool shifted) {
    [[maybe_unused]] const typename Backend::Guard guard(qv);
    require_feature_map(qv, "qv");
    Tensor dqv = new_feature_map(qv, qv.size(1));
    const Reuse reuse{reuse_v, reuse_out, reuse_grad};
    run_grouped_backward("grouped_window_attention_joint_backward", grad, qv, lse, nullptr, out,
                         windows, shifted, &dqv, nullptr, &reuse);
    return dqv;
  }

  static std::tuple<Tensor, Tensor> apply_grouped_window_scores_backward(
      const Tensor& grad, const Tensor& qv, const Tensor& lse, const Tensor& v, const Tensor& out,
      std::vector<int64_t> windows, bool shifted, bool need_qv, bool need_v) {
    [[maybe_unused]] const typename Backend::Guard guard(qv);
    require_feature_map(qv, "qv");
    require_feature_map(v, "v");
    Tensor dqv = need_qv ? new_feature_map(qv, qv.size(1)) : no_gradient(qv);
    Tensor dv = need_v ? new_feature_map(v, v.size(1)) : no_gradient(v);
    if (need_qv) torch::stable::zero_(dqv);  // nothing flows into qv's own values
    run_grouped_backward("apply_grouped_window_scores_backward", grad, qv, lse, &v, out, windows,
                         shifted, need_qv ? &dqv : nullptr, need_v ? &dv : nullptr);
    return {dqv, dv};
  }

  template <typename Library>
  static void implement(Library& m) {
    m.impl("window_attention", TORCH_BOX(&WindowAttentionOperators::window_attention));
    m.impl("apply_window_scores", TORCH_BOX(&WindowAttentionOperators::apply_window_scores));
    m.impl("window_attention_backward",
           TORCH_BOX(&WindowAttentionOperators::window_attention_backward));
    m.impl("grouped_window_attention",
           TORCH_BOX(&WindowAttentionOperators::grouped_window_attention));
    m.impl("grouped_window_attention_backward",
           TORCH_BOX(&WindowAttentionOperators::grouped_window_attention_backward));
    m.impl("apply_grouped_window_scores",
           TORCH_BOX(&WindowAttentionOperators::apply_grouped_window_scores));
    m.impl("apply_grouped_window_scores_backward",
           TORCH_BOX(&WindowAttentionOperators::apply_grouped_window_scores_backward));
  }

  // Parts of training on the CPU.
  template <typename Library>
  static void implement_for_cpu(Library& m) {
    m.impl("grouped_window_attention_joint_backward",
           TORCH_BOX(&WindowAttentionOperators::grouped_window_attention_joint_backward));
  }
};

}  // namespace sr_kernels
