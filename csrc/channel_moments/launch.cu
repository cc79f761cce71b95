#include "channel_moments/launch.h"

#include "channel_moments/backward.cuh"
#include "channel_moments/forward.cuh"
#include "common/launch.cuh"
#include "common/weight_gradient.cuh"
#include "common/workspace.h"

namespace sr_kernels {
namespace {

constexpr const char* kTooLarge =
    "the image is too large for a CUDA grid (H and W below 2^30, channels below 2^16)";

bool fits(const ChannelMomentsParams& p) {
  return p.height < 1 << 30 && p.width < 1 << 30 && p.channels < 1 << 16;
}

ChannelProductParams take(WorkspacePieces& pieces, const ChannelMomentsParams& f) {
  ChannelProductParams p{};
  p.size = image_size(f.batch, f.height, f.width);
  p.channels = static_cast<int>(f.channels);
  p.x = f.x;
  p.slices = weight_gradient_slices(p.size.pixels(), f.channels, f.channels);
  p.origins = pieces.take<float>(p.slices * f.channels);
  p.sums = pieces.take<float>(p.slices * f.channels);
  p.products = pieces.take<float>(p.slices * f.channels * f.channels);
  p.mean = f.mean;
  p.covariance = f.covariance;
  return p;
}
ChannelMomentsGradientParams take(WorkspacePieces& pieces, const ChannelMomentsBackwardParams& g) {
  const ChannelMomentsParams& f = g.forward;
  ChannelMomentsGradientParams p{};
  p.size = image_size(f.batch, f.height, f.width);
  p.channels = static_cast<int>(f.channels);
  p.x = f.x;
  p.dx = g.dx;
  p.mean = f.mean;
  p.mean_gradient = g.mean_gradient;
  p.covariance_gradient = g.covariance_gradient;
  p.weight = pieces.take<float>(f.channels * f.channels);
  p.start = pieces.take<float>(f.channels);
  p.origin = pieces.take<float>(f.channels);
  return p;
}

// With a thread for each element of the covariance.
template <typename Params>
const char* launch_elements(void (*kernel)(Params), const Params& p, void* stream) {
  const int64_t count = static_cast<int64_t>(p.channels) * p.channels;
  return launch_kernel(kernel, dim3(static_cast<unsigned>((count - 1) / kBlockThreads + 1)),
                       kBlockThreads, 0, stream, p);
}

template <typename E>
const char* run(const ChannelProductParams& p, void* stream) {
  const int64_t blocks = channel_product_blocks(p.channels) * p.slices;
  SR_KERNELS_RETURN_IF_ERROR(launch_kernel(channel_products_kernel<E>,
                                           dim3(static_cast<unsigned>(blocks)), kBlockThreads,
                                           ChannelProductTile::kSharedBytes, stream, p));
  return launch_elements(channel_moments_kernel, p, stream);
}
template <typename E>
const char* run(const ChannelMomentsGradientParams& p, void* stream) {
  using Tile = ChannelMomentsGradientTile;
  const int64_t tiles = (p.size.pixels() - 1) / Tile::kPixels + 1;
  if (tiles > kMaxGridX) return kTooLarge;
  SR_KERNELS_RETURN_IF_ERROR(launch_elements(fold_moments_gradient_kernel, p, stream));
  const int pieces = (p.channels - 1) / kProductRows + 1;
  return launch_kernel(channel_moments_gradient_kernel<E>,
                       dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(pieces)),
                       kBlockThreads, Tile::kSharedBytes, stream, p);
}

template <typename Params>
int64_t measure(const ChannelMomentsParams& f, const Params& p) {
  if (!fits(f)) return 0;  // the launch refuses it
  WorkspacePieces pieces(nullptr);
  take(pieces, p);
  return pieces.bytes();
}
template <typename Params>
const char* launch(const ChannelMomentsParams& f, const Params& p, void* workspace, void* stream) {
  if (!fits(f)) return kTooLarge;
  WorkspacePieces pieces(workspace);
  return for_kind(f.kind,
                  [&](auto element) { return run<decltype(element)>(take(pieces, p), stream); });
}

}  // namespace

int64_t channel_moments_workspace(const ChannelMomentsParams& p) { return measure(p, p); }
int64_t channel_moments_workspace(const ChannelMomentsBackwardParams& p) {
  return measure(p.forward, p);
}
const char* launch_channel_moments(const ChannelMomentsParams& p, void* workspace, void* stream) {
  return launch(p, p, workspace, stream);
}
const char* launch_channel_moments(const ChannelMomentsBackwardParams& p, void* workspace,
                                   void* stream) {
  return launch(p.forward, p, workspace, stream);
}

}  // namespace sr_kernels
