// From tensors to the attention block's params, with every check: shared by the CPU and CUDA
// operators.
#pragma once

#include <vector>

#include "attention_block/params.h"
#include "torch_adapter.h"
#include "window_attention/arguments.h"

namespace sr_kernels {

// Holds the geometries that the params point to.
class AttentionBlockArguments {
 public:
  // q nullptr: the queries are projected too, w_in is (2C, C, 1, 1); else w_in is (C, C, 1, 1).
  AttentionBlockArguments(const char* op, const Tensor& x, const Tensor* q, const Tensor& w_in,
                          const std::optional<Tensor>& b_in, const Tensor& w_out,
                          const std::optional<Tensor>& b_out, const std::vector<int64_t>& windows,
                          bool shifted) {
    require_feature_map(x, "x");
    const int64_t count = static_cast<int64_t>(windows.size()), channels = x.size(1);
    require(count > 0, op, ": windows must not be empty");
    require(channels > 0 && channels % count == 0, op,
            ": x must have a positive multiple of len(windows) = ", count, " channels, got ",
            shape_of(x));
    const int64_t rows = q == nullptr ? 2 * channels : channels;
    require_weight(w_in, {rows, channels, 1, 1}, x, q == nullptr ? "w_in" : "w_v");
    if (b_in.has_value()) require_weight(*b_in, {rows}, x, q == nullptr ? "b_in" : "b_v");
    require_weight(w_out, {channels, channels, 1, 1}, x, "w_out");
    if (b_out.has_value()) require_weight(*b_out, {channels}, x, "b_out");
    if (q != nullptr) require_weight(*q, {x.size(0), channels, x.size(2), x.size(3)}, x, "q");
    for (const int64_t window : windows) {
      const int64_t shift = group_shift(window, shifted);
      geometry_.push_back(checked_geometry(op, x, window, window, shift, shift));
    }
    params_.kind = scalar_kind(x, "x");
    params_.batch = x.size(0);
    params_.channels = channels;
    params_.height = x.size(2);
    params_.width = x.size(3);
    params_.groups = count;
    params_.w_in = w_in.data_ptr();
    params_.b_in = data_or_null(b_in);
    params_.w_out = w_out.data_ptr();
    params_.b_out = data_or_null(b_out);
    params_.x = feature_map(x);
    params_.reuse = q != nullptr;
    if (q != nullptr) params_.q = q->data_ptr();
  }

  // Everything but y, and q where it is to be written; valid as long as this object.
  AttentionBlockParams params() const {
    AttentionBlockParams p = params_;
    p.geometry = geometry_.data();
    return p;
  }

 private:
  static void require_weight(const Tensor& tensor, const std::vector<int64_t>& shape,
                             const Tensor& x, const char* name) {
    require_shape(tensor, shape, name);
    require_like(tensor, x, name, "x");
  }

  AttentionBlockParams params_{};
  std::vector<WindowGeometry> geometry_;
};

}  // namespace sr_kernels
