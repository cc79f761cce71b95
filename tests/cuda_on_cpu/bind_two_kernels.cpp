// Two of the kernels, one instance of each, for the faults that test_emulator.py plants in them.
#include "arrays.h"
#include "common/launch.cuh"
#include "conv3x3/forward.cuh"
#include "window_attention/forward.cuh"

using namespace sr_kernels;

PYBIND11_MODULE(two_kernels, m) {
  m.def("set_schedule", &cuda_on_cpu::set_schedule);
  // weight as pack_weight_kernel leaves it: (64-channel slices of the output, 9, C_in, 64), C_in a
  // multiple of 16.
  m.def("conv3x3", [](py::object x_, py::object weight_, py::object y_) {
    using Tile = Conv3x3Tile<__half>;
    const Array x(x_), weight(weight_), y(y_);
    Conv3x3KernelParams p{};
    p.size = {x.size(0), static_cast<int>(x.size(2)), static_cast<int>(x.size(3))};
    p.c_in = p.k_total = static_cast<int>(x.size(1));
    p.c_out = static_cast<int>(y.size(1));
    p.x = x.map();
    p.y = y.map();
    p.packed_weight = weight.data();
    const auto tiles = [](int pixels) { return (pixels + Tile::kEdge - 1) / Tile::kEdge; };
    const auto blocks =
        static_cast<unsigned>(p.size.batch * tiles(p.size.height) * tiles(p.size.width));
    require_success(launch_kernel(conv3x3_kernel<__half>,
                                  dim3(blocks, static_cast<unsigned>(weight.size(0))),
                                  kBlockThreads, Tile::kSharedBytes, nullptr, p));
  });
  // One head of up to 32 channels, the keys being the queries.
  m.def("window_attention", [](py::object q_, py::object v_, int window, py::object out_) {
    using Tile = WindowForwardTile<__half, 32>;
    const Array q(q_), v(v_), out(out_);
    WindowAttentionLaunch launch{};
    launch.count = 1;
    WindowAttentionParams& p = launch.group[0];
    p.batch = q.size(0);
    p.num_heads = 1;
    p.d_qk = q.size(1);
    p.d_v = v.size(1);
    p.geometry = make_window_geometry(q.size(2), q.size(3), window, window, 0, 0);
    p.scale = 1;
    p.q = q.map();
    p.v = v.map();
    p.out = out.map();
    launch.end[0] = RowPlan(p.geometry, p.batch, Tile::kRows).units();
    require_success(launch_kernel(window_attention_kernel<__half, 32>,
                                  dim3(static_cast<unsigned>(launch.end[0])), Tile::kThreads,
                                  Tile::kBiasAt, nullptr, launch));
  });
}
