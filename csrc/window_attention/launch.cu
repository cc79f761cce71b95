#include "window_attention/launch.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/launch.cuh"
#include "window_attention/backward.cuh"

namespace sr_kernels {
namespace {

constexpr const char* kTooLarge =
    "the image is too large for a CUDA grid (batch, H and W below 2^31, windows below 2^24 pixels)";

// What the kernels count in int.
bool fits(const WindowAttentionParams& p) {
  constexpr int64_t kMost = 0x7fffffff;
  return p.batch < kMost && p.geometry.height < kMost && p.geometry.width < kMost &&
         p.num_heads < kMost && p.geometry.tokens() < 1 << 24;
}

// function(element, kD): an element of the kind, and heads of up to kD channels.
template <typename E, typename Function>
const char* for_head(int64_t d, const Function& function) {
  if (d <= 32) return function(E{}, std::integral_constant<int, 32>{});
  if (d <= 64) return function(E{}, std::integral_constant<int, 64>{});
  if (d <= 128) return function(E{}, std::integral_constant<int, 128>{});
  return "CUDA kernels take heads of at most 128 channels";
}
template <typename Function>
const char* for_kind_and_head(ScalarKind kind, int64_t d, const Function& function) {
  return for_kind(kind, [&](auto element) { return for_head<decltype(element)>(d, function); });
}

template <typename E, int kD>
const char* forward(const WindowAttentionParams* groups, const std::vector<int64_t>& order,
                    bool reuse, void* stream) {
  using Tile = WindowForwardTile<E, kD>;
  const int64_t group_count = static_cast<int64_t>(order.size());
  for (int64_t first = 0; first < group_count; first += kMaxGroups) {
    WindowAttentionLaunch launch{};
    launch.reuse = reuse && sizeof(E) == 2;
    int64_t blocks = 0, bias = 0;
    for (int64_t i = first; i < group_count && i < first + kMaxGroups; ++i) {
      WindowAttentionParams& p = launch.group[launch.count];
      p = groups[order[i]];
      if (reuse && !launch.reuse) p.lse = FeatureMap{};  // not to be written
      const int64_t rows = p.bias == nullptr ? 0 : p.geometry.bias_rows();
      if (rows <= Tile::kMaxBias && rows > bias) bias = rows;
      blocks += RowPlan(p.geometry, p.batch, Tile::kRows).units() * p.num_heads;
      launch.end[launch.count++] = blocks;
    }
    if (blocks > kMaxGridX) return kTooLarge;
    if (blocks == 0) continue;
    const char* error =
        launch_kernel(window_attention_kernel<E, kD>, dim3(static_cast<unsigned>(blocks)),
                      Tile::kThreads, Tile::kBiasAt + static_cast<int>(bias) * 4, stream, launch);
    if (error != nullptr) return error;
  }
  return nullptr;
}

// Tables of the bias gradient a head: blocks that share its windows.
constexpr int64_t kBiasParts = 64;

// One group's part of a launch, with its pieces of the workspace; from nullptr, measures it.
template <typename E, int kD>
WindowGradientGroup gradient_group(const WindowAttentionBackwardParams& p, char* workspace,
                                   int64_t* used) {
  using Tile = WindowBackwardTile<E, kD>;
  const auto take = [&](int64_t bytes) {
    char* piece = workspace == nullptr ? nullptr : workspace + *used;
    *used += (bytes + 255) / 256 * 256;
    return piece;
  };
  const WindowAttentionParams& f = p.forward;
  const int64_t units = RowPlan(f.geometry, f.batch, Tile::kRows).units();
  const int64_t rows = f.geometry.bias_rows();
  WindowGradientGroup g{};
  g.forward = f;
  g.grad = p.grad;
  g.dq = p.dq;
  g.dk = p.dk;
  g.dv = p.dv;
  g.statistics = reinterpret_cast<RowStatistics*>(
      take(units * f.num_heads * Tile::kRows * static_cast<int64_t>(sizeof(RowStatistics))));
  g.blocks_per_head = units;
  if (p.dbias != nullptr) {
    g.blocks_per_head = std::min(units, kBiasParts);
    g.tables = rows <= Tile::kMaxGradient ? 1 : Tile::kThreads / 32;
    g.dbias_parts =
        reinterpret_cast<float*>(take(f.num_heads * g.blocks_per_head * g.tables * rows * 4));
  }
  return g;
}

template <typename E, int kD>
const char* backward(const WindowAttentionBackwardParams* groups, const std::vector<int64_t>& order,
                     char* workspace, void* stream) {
  using Tile = WindowBackwardTile<E, kD>;
  const int64_t group_count = static_cast<int64_t>(order.size());
  int64_t used = 0;
  for (int64_t first = 0; first < group_count; first += kMaxGroups) {
    WindowGradientLaunch launch{};
    launch.reuse = sizeof(E) == 2;
    int64_t statistics_blocks = 0, blocks = 0;
    int statistics_bias = 0, bias = 0;  // elements of shared memory
    for (int64_t i = first; i < group_count && i < first + kMaxGroups; ++i) {
      const WindowAttentionBackwardParams& p = groups[order[static_cast<size_t>(i)]];
      const WindowAttentionParams& f = p.forward;
      WindowGradientGroup& g = launch.group[launch.count];
      g = gradient_group<E, kD>(p, workspace, &used);
      const int64_t rows = f.bias == nullptr ? 0 : f.geometry.bias_rows();
      if (rows <= Tile::kMaxBias)
        statistics_bias = std::max(statistics_bias, static_cast<int>(rows));
      if (g.tables == 1)
        bias = std::max(bias, round_up(static_cast<int>(rows), 4) * (Tile::kThreads / 32 + 1));
      else if (g.tables == 0 && rows <= Tile::kMaxBias)
        bias = std::max(bias, static_cast<int>(rows));
      statistics_blocks += RowPlan(f.geometry, f.batch, Tile::kRows).units() * f.num_heads;
      blocks += g.blocks_per_head * f.num_heads;
      launch.statistics_end[launch.count] = statistics_blocks;
      launch.end[launch.count++] = blocks;
    }
    if (statistics_blocks > kMaxGridX) return kTooLarge;
    if (blocks == 0) continue;
    const char* error = launch_kernel(
        window_statistics_kernel<E, kD>, dim3(static_cast<unsigned>(statistics_blocks)),
        Tile::kThreads, Tile::kBiasAt + statistics_bias * 4, stream, launch);
    if (error != nullptr) return error;
    error = launch_kernel(window_gradient_kernel<E, kD>, dim3(static_cast<unsigned>(blocks)),
                          Tile::kThreads, Tile::kBiasAt + bias * 4, stream, launch);
    if (error != nullptr) return error;
    for (int i = 0; i < launch.count; ++i) {
      const WindowGradientGroup& g = launch.group[i];
      if (g.dbias_parts == nullptr) continue;
      const int64_t rows = g.forward.geometry.bias_rows(), heads = g.forward.num_heads;
      error = launch_kernel(
          window_bias_kernel<E>, dim3(static_cast<unsigned>((rows * heads + 255) / 256)), 256, 0,
          stream, static_cast<const float*>(g.dbias_parts), g.blocks_per_head * g.tables, rows,
          heads, static_cast<E*>(groups[order[static_cast<size_t>(first + i)]].dbias));
      if (error != nullptr) return error;
    }
  }
  return nullptr;
}

// What all groups of a call come to: the widest head, and the order in which they run, largest
// windows first.
struct Call {
  int64_t d = 0;
  bool fits = true;
  std::vector<int64_t> order;

  template <typename Forward>
  Call(int64_t count, const Forward& forward) {
    for (int64_t i = 0; i < count; ++i) {
      const WindowAttentionParams& p = forward(i);
      d = std::max({d, p.d_qk, p.d_v});
      fits = fits && sr_kernels::fits(p);
      order.push_back(i);
    }
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return forward(a).geometry.tokens() > forward(b).geometry.tokens();
    });
  }
};

}  // namespace

const char* launch_window_attention(const WindowAttentionParams* groups, int64_t group_count,
                                    bool reuse, void* stream) {
  const Call call(group_count, [&](int64_t i) -> auto& { return groups[i]; });
  if (!call.fits) return kTooLarge;
  return for_kind_and_head(groups[0].kind, call.d, [&](auto element, auto head) {
    return forward<decltype(element), decltype(head)::value>(groups, call.order, reuse, stream);
  });
}

int64_t window_attention_backward_workspace(const WindowAttentionBackwardParams* groups,
                                            int64_t group_count) {
  const Call call(group_count, [&](int64_t i) -> auto& { return groups[i].forward; });
  int64_t used = 0;
  for_kind_and_head(groups[0].forward.kind, call.d, [&](auto element, auto head) -> const char* {
    for (int64_t i = 0; i < group_count; ++i)
      gradient_group<decltype(element), decltype(head)::value>(groups[i], nullptr, &used);
    return nullptr;
  });
  return used;
}

const char* launch_window_attention_backward(const WindowAttentionBackwardParams* groups,
                                             int64_t group_count, void* workspace, void* stream) {
  const Call call(group_count, [&](int64_t i) -> auto& { return groups[i].forward; });
  if (!call.fits) return kTooLarge;
  return for_kind_and_head(groups[0].forward.kind, call.d, [&](auto element, auto head) {
    return backward<decltype(element), decltype(head)::value>(
        groups, call.order, static_cast<char*>(workspace), stream);
  });
}

}  // namespace sr_kernels
