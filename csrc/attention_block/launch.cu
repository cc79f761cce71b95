#include "attention_block/launch.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "attention_block/forward.cuh"
#include "common/workspace.h"
#include "window_attention/launch.h"

namespace sr_kernels {
namespace {

struct BlockMaps {
  FeatureMap projected;  // q0 v0 q1 v1 ..., or v0 v1 ... in reuse
  FeatureMap attended;
};
// Whether attention_block_kernel does it: in 16 bits, groups of up to 32 channels.
bool is_fused(const AttentionBlockParams& p) {
  return p.kind != ScalarKind::kFloat32 && p.channels / p.groups <= 32;
}
BlockMaps take_block_maps(WorkspacePieces& pieces, const AttentionBlockParams& p) {
  const auto map = [&](int64_t channels) {
    return take_map(pieces, p.kind, p.batch, channels, p.height, p.width, true);
  };
  BlockMaps maps;
  if (!is_fused(p)) maps.projected = map(p.reuse ? p.channels : 2 * p.channels);
  maps.attended = map(p.channels);
  return maps;
}

// out = weight x + bias (+ residual), weight (m_count, channels).
template <typename E>
const char* launch_projection(const AttentionBlockParams& p, const FeatureMap& x,
                              const void* weight, const void* bias, int64_t m_count,
                              const FeatureMap& residual, const FeatureMap& out, void* stream) {
  using Tile = ConvTile<E>;
  ConvParams c{};
  c.size = {p.batch, static_cast<int>(p.height), static_cast<int>(p.width)};
  c.k_count = static_cast<int>(p.channels);
  c.m_count = static_cast<int>(m_count);
  c.x = x;
  c.weight = weight;
  c.weight_stride_m = p.channels;
  c.weight_stride_k = 1;
  c.bias = bias;
  c.residual = residual;
  c.out = out;
  const int64_t blocks = (c.size.pixels() + Tile::kPixels - 1) / Tile::kPixels;
  const int64_t slices = (m_count + kProductRows - 1) / kProductRows;
  if (blocks > kMaxGridX || slices > kMaxGridYZ)
    return "the image or its channels are too large for a CUDA grid";
  return launch_kernel(conv_kernel<E>,
                       dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(slices)),
                       kBlockThreads, Tile::kSharedBytes, stream, c);
}

// The attention of all groups, projections included, into `attended`.
template <typename E>
const char* launch_fused(const AttentionBlockParams& p, const FeatureMap& attended, void* stream) {
  using Tile = AttentionBlockTile<E>;
  const int64_t d = p.channels / p.groups;
  const FeatureMap queries =
      p.q == nullptr ? FeatureMap{} : dense_map(p.q, p.channels, p.height, p.width, true);
  const auto from_channel = [](FeatureMap map, int64_t channel) {
    if (map.data != nullptr) map.data = static_cast<E*>(map.data) + channel * map.stride_c;
    return map;
  };
  std::vector<int64_t> order(static_cast<size_t>(p.groups));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return p.geometry[a].tokens() > p.geometry[b].tokens();  // the longest blocks first
  });
  for (int64_t first = 0; first < p.groups; first += kMaxGroups) {
    AttentionBlockLaunch launch{};
    launch.attention.reuse = p.reuse;
    launch.x = p.x;
    launch.channels = static_cast<int>(p.channels);
    launch.weight = p.w_in;
    launch.bias = p.b_in;
    int64_t blocks = 0;
    for (int64_t i = first; i < p.groups && i < first + kMaxGroups; ++i) {
      const int64_t g = order[static_cast<size_t>(i)];
      WindowAttentionParams& a = launch.attention.group[launch.attention.count];
      a.kind = p.kind;
      a.batch = p.batch;
      a.num_heads = 1;
      a.d_qk = a.d_v = d;
      a.geometry = p.geometry[g];
      a.scale = 1;
      a.q = from_channel(queries, g * d);
      a.out = from_channel(attended, g * d);
      launch.first_row[launch.attention.count] = static_cast<int>((p.reuse ? g : 2 * g) * d);
      blocks += RowPlan(a.geometry, a.batch, Tile::kRows).units();
      launch.attention.end[launch.attention.count++] = blocks;
    }
    if (blocks > kMaxGridX) return "the image is too large for a CUDA grid";
    SR_KERNELS_RETURN_IF_ERROR(launch_kernel(attention_block_kernel<E>,
                                             dim3(static_cast<unsigned>(blocks)), kBlockThreads,
                                             Tile::kSharedBytes, stream, launch));
  }
  return nullptr;
}

template <typename E>
const char* run_block(const AttentionBlockParams& p, void* workspace, void* stream) {
  if (p.height >= 1 << 30 || p.width >= 1 << 30 || p.channels >= 1 << 20)
    return "the image is too large for a CUDA grid (H and W below 2^30, "
           "channels below 2^20)";
  WorkspacePieces pieces(workspace);
  const BlockMaps maps = take_block_maps(pieces, p);
  if constexpr (sizeof(E) == 2)
    if (is_fused(p)) {
      SR_KERNELS_RETURN_IF_ERROR(launch_fused<E>(p, maps.attended, stream));
      return launch_projection<E>(p, maps.attended, p.w_out, p.b_out, p.channels, p.x, p.y, stream);
    }
  const int64_t d = p.channels / p.groups, projected = p.reuse ? p.channels : 2 * p.channels;
  const char* error =
      launch_projection<E>(p, p.x, p.w_in, p.b_in, projected, FeatureMap{}, maps.projected, stream);
  if (error != nullptr) return error;
  if (p.q != nullptr && !p.reuse) {
    const int64_t count = p.batch * p.channels * p.height * p.width;
    const int64_t blocks = (count + kBlockThreads - 1) / kBlockThreads;
    if (blocks > kMaxGridX) return "the image is too large for a CUDA grid";
    error =
        launch_kernel(copy_queries_kernel<E>, dim3(static_cast<unsigned>(blocks)), kBlockThreads, 0,
                      stream, static_cast<const E*>(maps.projected.data), static_cast<E*>(p.q),
                      count, static_cast<int>(p.channels), static_cast<int>(d));
    if (error != nullptr) return error;
  }
  const FeatureMap queries =
      p.reuse ? dense_map(p.q, p.channels, p.height, p.width, true) : maps.projected;
  const auto from_channel = [](FeatureMap map, int64_t channel) {
    map.data = static_cast<E*>(map.data) + channel * map.stride_c;
    return map;
  };
  std::vector<WindowAttentionParams> groups;
  for (int64_t g = 0; g < p.groups; ++g) {
    WindowAttentionParams a{};
    a.kind = p.kind;
    a.batch = p.batch;
    a.num_heads = 1;
    a.d_qk = a.d_v = d;
    a.geometry = p.geometry[g];
    a.scale = 1;
    a.q = from_channel(queries, (p.reuse ? g : 2 * g) * d);
    a.v = from_channel(maps.projected, (p.reuse ? g : 2 * g + 1) * d);
    a.out = from_channel(maps.attended, g * d);
    groups.push_back(a);
  }
  error = launch_window_attention(groups.data(), p.groups, false, stream);
  if (error != nullptr) return error;
  return launch_projection<E>(p, maps.attended, p.w_out, p.b_out, p.channels, p.x, p.y, stream);
}

}  // namespace

int64_t attention_block_workspace(const AttentionBlockParams& p) {
  WorkspacePieces pieces(nullptr);
  take_block_maps(pieces, p);
  return pieces.bytes();
}

const char* launch_attention_block(const AttentionBlockParams& p, void* workspace, void* stream) {
  switch (p.kind) {
    case ScalarKind::kFloat32:
      return run_block<float>(p, workspace, stream);
    case ScalarKind::kFloat16:
      return run_block<__half>(p, workspace, stream);
    case ScalarKind::kBFloat16:
      return run_block<__nv_bfloat16>(p, workspace, stream);
    case ScalarKind::kFloat64:
      break;
  }
  return "CUDA kernels take float32, float16 and bfloat16";
}

}  // namespace sr_kernels
