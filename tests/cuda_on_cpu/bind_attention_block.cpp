// The attention block's CUDA launches, with the arguments of the operators of csrc/library.cpp,
// then the arrays for the results.
#include <pybind11/stl.h>

#include "arrays.h"
#include "attention_block/launch.cu"
#include "window_attention/launch.cu"

using namespace sr_kernels;

namespace {

using Object = py::object;

void run(int kind, const Array& x, const Array& q, bool reuse, const Array& w_in, const Array& b_in,
         const Array& w_out, const Array& b_out, const std::vector<int>& windows, bool shifted,
         const Array& y) {
  std::vector<WindowGeometry> geometry;
  for (const int window : windows) {
    const int shift = shifted ? (window + 1) / 2 : 0;
    geometry.push_back(make_window_geometry(x.size(2), x.size(3), window, window, shift, shift));
  }
  AttentionBlockParams p{};
  p.kind = static_cast<ScalarKind>(kind);
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.height = x.size(2);
  p.width = x.size(3);
  p.groups = static_cast<int64_t>(windows.size());
  p.geometry = geometry.data();
  p.w_in = w_in.data();
  p.b_in = b_in.data();
  p.w_out = w_out.data();
  p.b_out = b_out.data();
  p.x = x.map();
  p.q = q.data();
  p.reuse = reuse;
  p.y = y.map();
  Workspace workspace(attention_block_workspace(p));
  require_success(launch_attention_block(p, workspace.data(), nullptr));
}

}  // namespace

PYBIND11_MODULE(attention_block, m) {
  m.def("set_schedule", &cuda_on_cpu::set_schedule);
  m.def("shared_bytes", [] { return AttentionBlockTile<__half>::kSharedBytes; });
  m.def("grouped_attention_block",
        [](int kind, Object x_, Object w_in_, Object b_in_, Object w_out_, Object b_out_,
           std::vector<int> windows, bool shifted, bool, Object y_, Object q_) {
          const Array x(x_), w_in(w_in_), b_in(b_in_), w_out(w_out_), b_out(b_out_), y(y_), q(q_);
          run(kind, x, q, false, w_in, b_in, w_out, b_out, windows, shifted, y);
        });
  m.def("apply_grouped_attention_block",
        [](int kind, Object x_, Object q_, Object w_v_, Object b_v_, Object w_out_, Object b_out_,
           std::vector<int> windows, bool shifted, Object y_) {
          const Array x(x_), q(q_), w_v(w_v_), b_v(b_v_), w_out(w_out_), b_out(b_out_), y(y_);
          run(kind, x, q, true, w_v, b_v, w_out, b_out, windows, shifted, y);
        });
}
