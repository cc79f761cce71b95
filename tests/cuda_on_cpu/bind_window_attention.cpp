// The window attention's CUDA launches, with the arguments of the operators of csrc/library.cpp,
// then the arrays for the results.
#include <pybind11/stl.h>

#include "arrays.h"
#include "window_attention/launch.cu"

using namespace sr_kernels;

namespace {

using Object = py::object;

WindowAttentionParams window_params(int kind, const Array& q, const Array& k, const Array& v,
                                    const Array& bias, int window_h, int window_w, int64_t shift_h,
                                    int64_t shift_w, int64_t heads, double scale, bool mask) {
  WindowAttentionParams p{};
  p.kind = static_cast<ScalarKind>(kind);
  p.batch = q.size(0);
  p.num_heads = heads;
  p.d_qk = q.size(1) / heads;
  p.d_v = v.size(1) / heads;
  p.geometry = make_window_geometry(q.size(2), q.size(3), window_h, window_w, shift_h, shift_w);
  p.mask = mask;
  p.scale = scale;
  p.q = q.map();
  p.k = k.map();
  p.v = v.map();
  p.bias = bias.data();
  return p;
}

FeatureMap from_channel(const Array& array, int64_t channel, int64_t element_size) {
  FeatureMap map = array.map();
  if (map.data != nullptr)
    map.data = static_cast<char*>(map.data) + channel * map.stride_c * element_size;
  return map;
}

// As group_params of csrc/window_attention/arguments.h; values are in qv where v is absent.
std::vector<WindowAttentionParams> group_params(int kind, const Array& qv, const Array* v,
                                                const std::vector<int>& windows, bool shifted) {
  const int64_t count = static_cast<int64_t>(windows.size()), element = kind == 0 ? 4 : 2;
  const int64_t d = qv.size(1) / (2 * count);
  std::vector<WindowAttentionParams> groups;
  for (int64_t g = 0; g < count; ++g) {
    const int window = windows[static_cast<size_t>(g)], shift = shifted ? (window + 1) / 2 : 0;
    WindowAttentionParams p{};
    p.kind = static_cast<ScalarKind>(kind);
    p.batch = qv.size(0);
    p.num_heads = 1;
    p.d_qk = d;
    p.d_v = v == nullptr ? d : v->size(1) / count;
    p.geometry = make_window_geometry(qv.size(2), qv.size(3), window, window, shift, shift);
    p.scale = 1;
    p.q = from_channel(qv, 2 * g * d, element);
    p.v = v == nullptr ? from_channel(qv, (2 * g + 1) * d, element)
                       : from_channel(*v, g * p.d_v, element);
    groups.push_back(p);
  }
  return groups;
}

void run(const std::vector<WindowAttentionParams>& groups, bool reuse) {
  require_success(
      launch_window_attention(groups.data(), static_cast<int64_t>(groups.size()), reuse, nullptr));
}

void run_backward(const std::vector<WindowAttentionBackwardParams>& groups) {
  const int64_t count = static_cast<int64_t>(groups.size());
  Workspace workspace(window_attention_backward_workspace(groups.data(), count));
  require_success(
      launch_window_attention_backward(groups.data(), count, workspace.data(), nullptr));
}

// As run_grouped_backward of csrc/window_attention/ops_cuda.cpp.
void run_grouped_backward(int kind, const Array& grad, const Array& qv, const Array& lse,
                          const Array* v, const std::vector<int>& windows, bool shifted,
                          const Array& dqv, const Array* dv) {
  const int64_t element = kind == 0 ? 4 : 2;
  const auto groups = group_params(kind, qv, v, windows, shifted);
  std::vector<WindowAttentionBackwardParams> backward;
  for (size_t i = 0; i < groups.size(); ++i) {
    const int64_t g = static_cast<int64_t>(i);
    WindowAttentionBackwardParams p{};
    p.forward = groups[i];
    p.forward.lse = from_channel(lse, g, 4);
    const int64_t d = p.forward.d_qk, d_v = p.forward.d_v;
    p.grad = from_channel(grad, g * d_v, element);
    p.dq = from_channel(dqv, 2 * g * d, element);
    p.dv = v == nullptr ? from_channel(dqv, (2 * g + 1) * d, element)
                        : from_channel(*dv, g * d_v, element);
    backward.push_back(p);
  }
  run_backward(backward);
}

// Bytes that a block asks for, without a bias.
template <typename E, int kD>
void add_shared_bytes(py::dict& bytes, const char* head) {
  bytes[py::str(cuda_on_cpu::text("window_attention_kernel<", head))] =
      WindowForwardTile<E, kD>::kBiasAt;
  bytes[py::str(cuda_on_cpu::text("window_gradient_kernel<", head))] =
      WindowBackwardTile<E, kD>::kBiasAt;
}

}  // namespace

PYBIND11_MODULE(window_attention, m) {
  m.def("set_schedule", &cuda_on_cpu::set_schedule);
  m.def("shared_bytes", [] {
    py::dict bytes;
    add_shared_bytes<float, 32>(bytes, "float, 32>");
    add_shared_bytes<float, 64>(bytes, "float, 64>");
    add_shared_bytes<float, 128>(bytes, "float, 128>");
    add_shared_bytes<__half, 32>(bytes, "__half, 32>");
    add_shared_bytes<__half, 64>(bytes, "__half, 64>");
    add_shared_bytes<__half, 128>(bytes, "__half, 128>");
    return bytes;
  });
  m.def("window_attention", [](int kind, Object q_, Object k_, Object v_, Object bias_,
                               int window_h, int window_w, int64_t shift_h, int64_t shift_w,
                               int64_t heads, double scale, bool mask, Object out_, Object lse_) {
    const Array q(q_), k(k_), v(v_), bias(bias_), out(out_), lse(lse_);
    WindowAttentionParams p = window_params(kind, q, k, v, bias, window_h, window_w, shift_h,
                                            shift_w, heads, scale, mask);
    p.out = out.map();
    p.lse = lse.map();
    run({p}, false);
  });
  m.def("apply_window_scores",
        [](int kind, Object q_, Object k_, Object lse_, Object v_, Object bias_, int window_h,
           int window_w, int64_t shift_h, int64_t shift_w, int64_t heads, double scale, bool mask,
           Object out_) {
          const Array q(q_), k(k_), lse(lse_), v(v_), bias(bias_), out(out_);
          WindowAttentionParams p = window_params(kind, q, k, v, bias, window_h, window_w, shift_h,
                                                  shift_w, heads, scale, mask);
          p.out = out.map();
          p.lse = lse.map();
          run({p}, true);
        });
  m.def("grouped_window_attention",
        [](int kind, Object qv_, std::vector<int> windows, bool shifted, Object out_, Object lse_) {
          const Array qv(qv_), out(out_), lse(lse_);
          auto groups = group_params(kind, qv, nullptr, windows, shifted);
          int64_t g = 0;
          for (WindowAttentionParams& p : groups) {
            p.out = from_channel(out, g * p.d_v, kind == 0 ? 4 : 2);
            p.lse = from_channel(lse, g++, 4);
          }
          run(groups, false);
        });
  m.def("apply_grouped_window_scores", [](int kind, Object qv_, Object lse_, Object v_,
                                          std::vector<int> windows, bool shifted, Object out_) {
    const Array qv(qv_), lse(lse_), v(v_), out(out_);
    auto groups = group_params(kind, qv, &v, windows, shifted);
    int64_t g = 0;
    for (WindowAttentionParams& p : groups) {
      p.out = from_channel(out, g * p.d_v, kind == 0 ? 4 : 2);
      p.lse = from_channel(lse, g++, 4);
    }
    run(groups, true);
  });
  m.def("window_attention_backward",
        [](int kind, Object grad_, Object q_, Object k_, Object lse_, Object v_, Object bias_,
           int window_h, int window_w, int64_t shift_h, int64_t shift_w, int64_t heads,
           double scale, bool mask, Object dq_, Object dk_, Object dv_, Object dbias_) {
          const Array grad(grad_), q(q_), k(k_), lse(lse_), v(v_), bias(bias_), dq(dq_), dk(dk_),
              dv(dv_), dbias(dbias_);
          WindowAttentionBackwardParams p{};
          p.forward = window_params(kind, q, k, v, bias, window_h, window_w, shift_h, shift_w,
                                    heads, scale, mask);
          p.forward.lse = lse.map();
          p.grad = grad.map();
          p.dq = dq.map();
          p.dk = dk.map();
          p.dv = dv.map();
          p.dbias = dbias.data();
          run_backward({p});
        });
  m.def("grouped_window_attention_backward",
        [](int kind, Object grad_, Object qv_, Object, Object lse_, std::vector<int> windows,
           bool shifted, Object dqv_) {
          const Array grad(grad_), qv(qv_), lse(lse_), dqv(dqv_);
          run_grouped_backward(kind, grad, qv, lse, nullptr, windows, shifted, dqv, nullptr);
        });
  m.def("apply_grouped_window_scores_backward",
        [](int kind, Object grad_, Object qv_, Object lse_, Object v_, Object,
           std::vector<int> windows, bool shifted, Object dqv_, Object dv_) {
          const Array grad(grad_), qv(qv_), lse(lse_), v(v_), dqv(dqv_), dv(dv_);
          dqv.zero();  // as the operator does: nothing flows into qv's own values
          run_grouped_backward(kind, grad, qv, lse, &v, windows, shifted, dqv, &dv);
        });
}
