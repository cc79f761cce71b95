#include "window_attention/launch.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/launch.cuh"
#include "window_attention/forward.cuh"

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
  switch (kind) {
    case ScalarKind::kFloat32:
      return for_head<float>(d, function);
    case ScalarKind::kFloat16:
      return for_head<__half>(d, function);
    case ScalarKind::kBFloat16:
      return for_head<__nv_bfloat16>(d, function);
    case ScalarKind::kFloat64:
      break;
  }
  return "CUDA kernels take float32, float16 and bfloat16";
}

// The groups in the order in which they run: largest windows first.
std::vector<int64_t> largest_first(const std::vector<int>& tokens) {
  std::vector<int64_t> order(tokens.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return tokens[a] > tokens[b]; });
  return order;
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

}  // namespace

const char* launch_window_attention(const WindowAttentionParams* groups, int64_t group_count,
                                    bool reuse, void* stream) {
  int64_t d = 0;
  std::vector<int> tokens;
  for (int64_t i = 0; i < group_count; ++i) {
    if (!fits(groups[i])) return kTooLarge;
    d = std::max({d, groups[i].d_qk, groups[i].d_v});
    tokens.push_back(groups[i].geometry.tokens());
  }
  return for_kind_and_head(groups[0].kind, d, [&](auto element, auto head) {
    return forward<decltype(element), decltype(head)::value>(groups, largest_first(tokens), reuse,
                                                             stream);
  });
}

}  // namespace sr_kernels
