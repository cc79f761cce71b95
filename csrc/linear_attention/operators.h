// The linear attention block's operator, for any device: checks, outputs, params. Backend says what
// a device adds to that: run(params).
#pragma once

#include "linear_attention/params.h"
#include "torch_adapter.h"
#include "window_attention/arguments.h"

namespace sr_kernels {

template <typename Backend>
struct LinearAttentionOperators {
  static Tensor linear_attention_block(const Tensor& x, const Tensor& w0_,
                                       const std::optional<Tensor>& b0_, const Tensor& w_depth_,
                                       const Tensor& w1_, const std::optional<Tensor>& b1_,
                                       const Tensor& w_qkv_, const std::optional<Tensor>& b_qkv_,
                                       const Tensor& w_out_, const std::optional<Tensor>& b_out_,
                                       int64_t window_h, int64_t window_w, int64_t shift_h,
                                       int64_t shift_w, int64_t num_heads, double scale) {
    const char* op = "linear_attention_block";
    require_feature_map(x, "x");
    const int64_t c = x.size(1);
    require(num_heads > 0, op, ": num_heads must be positive, got ", num_heads);
    require(c > 0 && c % num_heads == 0, op,
            ": x must have a positive multiple of num_heads = ", num_heads, " channels, got ",
            shape_of(x));
    const auto weight = [&](const Tensor& tensor, const std::vector<int64_t>& shape,
                            const char* name) {
      require_shape(tensor, shape, name);
      require_like(tensor, x, name, "x");
      return dense(tensor);
    };
    const auto bias = [&](const std::optional<Tensor>& tensor, int64_t count, const char* name) {
      return tensor.has_value() ? std::optional<Tensor>(weight(*tensor, {count}, name))
                                : std::nullopt;
    };
    const Tensor w0 = weight(w0_, {c, c, 1, 1}, "w0");
    const Tensor w_depth = weight(w_depth_, {c, 1, 3, 3}, "w_depth");
    const Tensor w1 = weight(w1_, {c, c, 1, 1}, "w1");
    const Tensor w_qkv = weight(w_qkv_, {3 * c, c, 1, 1}, "w_qkv");
    const Tensor w_out = weight(w_out_, {c, c, 1, 1}, "w_out");
    const std::optional<Tensor> b0 = bias(b0_, c, "b0"), b1 = bias(b1_, c, "b1");
    const std::optional<Tensor> b_qkv = bias(b_qkv_, 3 * c, "b_qkv");
    const std::optional<Tensor> b_out = bias(b_out_, c, "b_out");
    LinearAttentionParams p{};
    p.kind = scalar_kind(x, "x");
    p.batch = x.size(0);
    p.channels = c;
    p.num_heads = num_heads;
    p.geometry = checked_geometry(op, x, window_h, window_w, shift_h, shift_w);
    p.scale = scale;
    p.w0 = w0.data_ptr();
    p.b0 = data_or_null(b0);
    p.w_depth = w_depth.data_ptr();
    p.w1 = w1.data_ptr();
    p.b1 = data_or_null(b1);
    p.w_qkv = w_qkv.data_ptr();
    p.b_qkv = data_or_null(b_qkv);
    p.w_out = w_out.data_ptr();
    p.b_out = data_or_null(b_out);
    p.x = feature_map(x);
    Tensor y = new_feature_map(x, c);
    p.y = feature_map(y);
    if (y.numel() > 0) Backend::run(p);
    return y;
  }

  template <typename Library>
  static void implement(Library& m) {
    m.impl("linear_attention_block", TORCH_BOX(&LinearAttentionOperators::linear_attention_block));
  }
};

}  // namespace sr_kernels
