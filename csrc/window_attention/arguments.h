// From tensors to the window attention kernels' params, with every check: shared by the CPU and
// CUDA operators.
#pragma once

#include <limits>
#include <vector>

#include "torch_adapter.h"
#include "window_attention/params.h"

namespace sr_kernels {

inline WindowGeometry checked_geometry(const char* op, const Tensor& like, int64_t window_h,
                                       int64_t window_w, int64_t shift_h, int64_t shift_w) {
  const int64_t height = like.size(2), width = like.size(3);
  require(window_h > 0 && window_w > 0, op, ": window must be positive, got ", window_h, " x ",
          window_w);
  // Tokens of one window are counted in int.
  require(window_h <= std::numeric_limits<int>::max() / window_w, op, ": window ", window_h, " x ",
          window_w, " has too many pixels");
  require(height % window_h == 0 && width % window_w == 0, op, ": window ", window_h, " x ",
          window_w, " does not divide the image, H x W = ", height, " x ", width);
  // An empty image has no windows; the geometry's modulus still needs a size.
  if (height == 0 || width == 0)
    return {height, width, static_cast<int>(window_h), static_cast<int>(window_w), 0, 0};
  return make_window_geometry(height, width, static_cast<int>(window_h), static_cast<int>(window_w),
                              shift_h, shift_w);
}

// Everything but out and lse.
inline WindowAttentionParams window_params(const char* op, const Tensor& q,
                                           const std::optional<Tensor>& k, const Tensor& v,
                                           const std::optional<Tensor>& bias, int64_t window_h,
                                           int64_t window_w, int64_t shift_h, int64_t shift_w,
                                           int64_t num_heads, double scale, bool mask) {
  require_feature_map(q, "q");
  require_feature_map(v, "v");
  require(num_heads > 0, op, ": num_heads must be positive, got ", num_heads);
  require(q.size(1) > 0 && q.size(1) % num_heads == 0, op,
          ": q must have a positive multiple of num_heads = ", num_heads, " channels, got ",
          shape_of(q));
  require(v.size(1) > 0 && v.size(1) % num_heads == 0, op,
          ": v must have a positive multiple of num_heads = ", num_heads, " channels, got ",
          shape_of(v));
  if (k.has_value()) {
    require_shape(*k, {q.size(0), q.size(1), q.size(2), q.size(3)}, "k");
    require_like(*k, q, "k", "q");
  }
  require_shape(v, {q.size(0), v.size(1), q.size(2), q.size(3)}, "v");
  require_like(v, q, "v", "q");
  WindowAttentionParams p{};
  p.kind = scalar_kind(q, "q");
  p.batch = q.size(0);
  p.num_heads = num_heads;
  p.d_qk = q.size(1) / num_heads;
  p.d_v = v.size(1) / num_heads;
  p.geometry = checked_geometry(op, q, window_h, window_w, shift_h, shift_w);
  p.mask = mask;
  p.scale = scale;
  p.q = feature_map(q);
  p.k = feature_map(k);
  p.v = feature_map(v);
  if (bias.has_value()) {
    require_shape(*bias, {p.geometry.bias_rows(), num_heads}, "bias");
    require_like(*bias, q, "bias", "q");
    p.bias = bias->data_ptr();
  }
  return p;
}

inline void check_lse(const Tensor& lse, const Tensor& q, int64_t heads) {
  require_shape(lse, {q.size(0), heads, q.size(2), q.size(3)}, "lse");
  require(lse.scalar_type() == compute_type(q),
          "lse must be float32, or float64 where q is float64");
  require(lse.is_cpu() == q.is_cpu() && lse.get_device_index() == q.get_device_index(),
          "lse must be on the device of q");
}

inline Tensor new_lse(const Tensor& q, int64_t heads) {
  return new_tensor(q, {q.size(0), heads, q.size(2), q.size(3)}, compute_type(q));
}

// The map from channel c on.
inline FeatureMap from_channel(FeatureMap map, const Tensor& tensor, int64_t channel) {
  map.data = static_cast<char*>(map.data) +
             channel * map.stride_c * static_cast<int64_t>(tensor.element_size());
  return map;
}

// ------------------------------------------------------------------ channel groups

// torch.roll(x, -window // 2), a floor division: half a window, rounded up.
inline int64_t group_shift(int64_t window, bool shifted) { return shifted ? (window + 1) / 2 : 0; }

// Params of every group. v nullptr: values are the odd slices of qv, else (N, C', H, W) in group
// order. Out and lse are left open.
inline std::vector<WindowAttentionParams> group_params(const char* op, const Tensor& qv,
                                                       const Tensor* v,
                                                       const std::vector<int64_t>& windows,
                                                       bool shifted) {
  require_feature_map(qv, "qv");
  const int64_t count = static_cast<int64_t>(windows.size());
  require(count > 0, op, ": windows must not be empty");
  require(qv.size(1) > 0 && qv.size(1) % (2 * count) == 0, op,
          ": qv must have a positive multiple of 2 * len(windows) = ", 2 * count, " channels, got ",
          shape_of(qv));
  const int64_t d = qv.size(1) / (2 * count);
  if (v != nullptr) {
    require_feature_map(*v, "v");
    require_shape(*v, {qv.size(0), v->size(1), qv.size(2), qv.size(3)}, "v");
    require(v->size(1) > 0 && v->size(1) % count == 0, op,
            ": v must have a positive multiple of len(windows) = ", count, " channels, got ",
            shape_of(*v));
    require_like(*v, qv, "v", "qv");
  }
  std::vector<WindowAttentionParams> groups;
  for (int64_t g = 0; g < count; ++g) {
    const int64_t window = windows[static_cast<size_t>(g)];
    const int64_t shift = group_shift(window, shifted);
    WindowAttentionParams p{};
    p.kind = scalar_kind(qv, "qv");
    p.batch = qv.size(0);
    p.num_heads = 1;
    p.d_qk = d;
    p.d_v = v == nullptr ? d : v->size(1) / count;
    p.geometry = checked_geometry(op, qv, window, window, shift, shift);
    p.mask = false;
    p.scale = 1;
    p.q = from_channel(feature_map(qv), qv, 2 * g * d);
    p.v = v == nullptr ? from_channel(feature_map(qv), qv, (2 * g + 1) * d)
                       : from_channel(feature_map(*v), *v, g * p.d_v);
    groups.push_back(p);
  }
  return groups;
}

}  // namespace sr_kernels
