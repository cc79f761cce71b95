#include "conv3x3/launch.h"

#include "common/launch.cuh"
#include "common/workspace.h"
#include "conv3x3/forward.cuh"

namespace sr_kernels {
namespace {

constexpr const char* kTooLarge =
    "the image is too large for a CUDA grid (H and W below 2^30, channels below 2^20)";

bool fits(const Conv3x3Params& p) {
  return p.height < 1 << 30 && p.width < 1 << 30 && p.c_in < 1 << 20 && p.c_out < 1 << 20;
}

// The weights in the order of the kernel: slices of 64 output channels, each with k_total inputs.
struct PackedWeight {
  int64_t slices, k_total;
  int64_t count() const { return slices * kTapCount * k_total * kProductRows; }
};
template <typename E>
PackedWeight packed_weight(const Conv3x3Params& p) {
  return {(p.c_out + kProductRows - 1) / kProductRows,
          Conv3x3Tile<E>::padded(static_cast<int>(p.c_in))};
}

template <typename E>
const char* run(const Conv3x3Params& p, void* workspace, void* stream) {
  using Tile = Conv3x3Tile<E>;
  const PackedWeight packed = packed_weight<E>(p);
  const int64_t tiles = (p.width + Tile::kEdge - 1) / Tile::kEdge *
                        ((p.height + Tile::kEdge - 1) / Tile::kEdge) * p.batch;
  const int64_t pack_blocks = (packed.count() + kBlockThreads - 1) / kBlockThreads;
  if (tiles > kMaxGridX || packed.slices > kMaxGridYZ || pack_blocks > kMaxGridX) return kTooLarge;
  if (tiles == 0) return nullptr;

  Conv3x3KernelParams k{};
  k.size = {p.batch, static_cast<int>(p.height), static_cast<int>(p.width)};
  k.c_in = static_cast<int>(p.c_in);
  k.c_out = static_cast<int>(p.c_out);
  k.k_total = static_cast<int>(packed.k_total);
  k.x = p.x;
  k.skip = p.skip;
  k.y = p.y;
  k.packed_weight = workspace;
  k.bias = p.bias;
  k.activation = p.activation;
  k.slope = static_cast<float>(p.negative_slope);
  SR_KERNELS_RETURN_IF_ERROR(launch_kernel(
      pack_weight_kernel<E>, dim3(static_cast<unsigned>(pack_blocks)), kBlockThreads, 0, stream,
      p.weight, k.c_out, k.c_in, k.k_total, packed.count(), static_cast<E*>(workspace)));
  return launch_kernel(conv3x3_kernel<E>,
                       dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(packed.slices)),
                       kBlockThreads, Tile::kSharedBytes, stream, k);
}

}  // namespace

int64_t conv3x3_workspace(const Conv3x3Params& p) {
  if (!fits(p)) return 0;  // the launch refuses it
  int64_t bytes = 0;
  for_kind(p.kind, [&](auto element) -> const char* {
    using E = decltype(element);
    WorkspacePieces pieces(nullptr);
    pieces.take<E>(packed_weight<E>(p).count());
    bytes = pieces.bytes();
    return nullptr;
  });
  return bytes;
}

const char* launch_conv3x3(const Conv3x3Params& p, void* workspace, void* stream) {
  if (!fits(p)) return kTooLarge;
  return for_kind(p.kind,
                  [&](auto element) { return run<decltype(element)>(p, workspace, stream); });
}

}  // namespace sr_kernels
