#include "attention_gates/launch.h"

#include <algorithm>

#include "attention_gates/backward.cuh"
#include "attention_gates/forward.cuh"
#include "common/weight_gradient.cuh"
#include "common/workspace.h"

namespace sr_kernels {
namespace {

constexpr const char* kTooLarge =
    "the image is too large for a CUDA grid (H and W below 2^30, channels below 2^16)";

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename Params>
ImageSize size_of(const Params& p) {
  return image_size(p.batch, p.height, p.width);
}
template <typename Params>
bool fits(const Params& p, int64_t channels) {
  return p.height < 1 << 30 && p.width < 1 << 30 && channels < 1 << 16;
}

// A launch of 256 threads a block.
template <typename... Formal, typename... Params>
const char* launch_blocks(void (*kernel)(Formal...), int64_t x, int64_t y, int shared_bytes,
                          void* stream, const Params&... params) {
  if (x > kMaxGridX || y > kMaxGridYZ) return kTooLarge;
  if (x == 0 || y == 0) return nullptr;
  const dim3 grid(static_cast<unsigned>(x), static_cast<unsigned>(y));
  return launch_kernel(kernel, grid, kBlockThreads, shared_bytes, stream, params...);
}
// With a thread for each of `count` items.
template <typename... Formal, typename... Params>
const char* launch_threads(void (*kernel)(Formal...), int64_t count, void* stream,
                           const Params&... params) {
  return launch_blocks(kernel, ceil_div(count, kBlockThreads), 1, 0, stream, params...);
}

// A dense map of an operator's own, in the type of x.
FeatureMap take_map(WorkspacePieces& pieces, ScalarKind kind, const ImageSize& size,
                    int64_t channels, const FeatureMap& like) {
  return take_map(pieces, kind, size.batch, channels, size.height, size.width, like.stride_c == 1);
}

// ------------------------------------------------------------------ pixel attention

template <typename E>
const char* run(const PixelAttentionParams& f, const FeatureMap& grad, const FeatureMap& out,
                const FeatureMap& dz, float* maximum, float* mean, void* stream) {
  const PixelGateParams p{
      size_of(f), static_cast<int>(f.channels), f.x, grad, f.weight, f.bias, out, dz, maximum,
      mean};
  return launch_blocks(pixel_gate_kernel<E>, ceil_div(p.size.pixels(), ConvTile<E>::kPixels), 1,
                       ConvTile<E>::kSharedBytes, stream, p);
}

struct PixelBackward {
  FeatureMap dz;
  WeightGradient gradient;
};
PixelBackward take(WorkspacePieces& pieces, const PixelAttentionBackwardParams& p) {
  const PixelAttentionParams& f = p.forward;
  PixelBackward b{};
  b.dz = take_map(pieces, f.kind, size_of(f), f.channels, f.x);
  b.gradient = take_weight_gradient(pieces, size_of(f).pixels(), f.channels, f.channels,
                                    p.dweight != nullptr, p.dbias != nullptr);
  return b;
}
template <typename E>
const char* run(const PixelAttentionBackwardParams& p, WorkspacePieces& pieces, void* stream) {
  const PixelAttentionParams& f = p.forward;
  const PixelBackward b = take(pieces, p);
  SR_KERNELS_RETURN_IF_ERROR(run<E>(f, p.grad, p.dx, b.dz, nullptr, nullptr, stream));
  if (p.dx.data != nullptr) {  // dx holds g s: W^T dz comes on top
    ConvParams c{};
    c.size = size_of(f);
    c.k_count = c.m_count = static_cast<int>(f.channels);
    c.x = b.dz;
    c.weight = f.weight;
    c.weight_stride_m = 1;
    c.weight_stride_k = f.channels;
    c.residual = c.out = p.dx;
    SR_KERNELS_RETURN_IF_ERROR(
        launch_blocks(conv_kernel<E>, ceil_div(c.size.pixels(), ConvTile<E>::kPixels),
                      ceil_div(f.channels, kProductRows), ConvTile<E>::kSharedBytes, stream, c));
  }
  return launch_weight_gradient<E>(b.gradient, size_of(f), b.dz, f.x, Shift(), Activation::kNone,
                                   0.0f, p.dweight, p.dbias, stream);
}

// ------------------------------------------------------------------ spatial attention

SpatialParams take(WorkspacePieces& pieces, const SpatialAttentionParams& f) {
  SpatialParams p{};
  p.size = size_of(f);
  p.channels = static_cast<int>(f.channels);
  p.kernel = static_cast<int>(f.kernel);
  p.u = f.x;
  p.weight = f.weight;
  p.bias = f.bias;
  p.out = f.y;
  p.maximum = pieces.take<float>(p.size.pixels());
  p.mean = pieces.take<float>(p.size.pixels());
  return p;
}
PixelAttentionParams pixel_part(const SpatialAttentionParams& f) {
  PixelAttentionParams p{};
  p.kind = f.kind;
  p.batch = f.batch;
  p.height = f.height;
  p.width = f.width;
  p.channels = f.channels;
  p.x = f.x;
  p.weight = f.pixel_weight;
  p.bias = f.pixel_bias;
  return p;
}
// u, into a map of its own where there is a pixel part, and its statistics.
template <typename E>
const char* run_statistics(const SpatialAttentionParams& f, const SpatialParams& p, void* stream) {
  if (f.pixel_weight == nullptr)
    return launch_threads(spatial_statistics_kernel<E>, p.size.pixels(), stream, p);
  return run<E>(pixel_part(f), FeatureMap{}, p.u, FeatureMap{}, p.maximum, p.mean, stream);
}
template <typename E>
const char* run(const SpatialAttentionParams& f, WorkspacePieces& pieces, void* stream) {
  SpatialParams p = take(pieces, f);
  if (f.pixel_weight != nullptr) p.u = f.y;  // until it is scaled
  SR_KERNELS_RETURN_IF_ERROR(run_statistics<E>(f, p, stream));
  return launch_threads(spatial_scale_kernel<E>, p.size.pixels(), stream, p);
}

struct SpatialBackward {
  SpatialParams p;
  FeatureMap du;
  bool pixel;                         // there is a pixel part, and its gradients are wanted
  PixelAttentionBackwardParams next;  // of it
};
SpatialBackward take(WorkspacePieces& pieces, const SpatialAttentionBackwardParams& g) {
  const SpatialAttentionParams& f = g.forward;
  SpatialBackward b{};
  b.p = take(pieces, f);
  b.p.grad = g.grad;
  b.p.gate = pieces.take<float>(b.p.size.pixels());
  b.p.d = pieces.take<float>(b.p.size.pixels());
  b.p.slices = static_cast<int>(std::clamp<int64_t>(b.p.size.pixels() / 2048, 1, 64));
  b.p.taps = pieces.take<float>(b.p.slices * (2 * f.kernel * f.kernel + 1));
  b.p.out = g.dx;
  if (f.pixel_weight == nullptr) return b;
  b.p.u = take_map(pieces, f.kind, b.p.size, f.channels, f.x);
  b.p.out = FeatureMap{};
  b.pixel = g.dx.data != nullptr || g.dpixel_weight != nullptr || g.dpixel_bias != nullptr;
  if (!b.pixel) return b;
  b.p.out = take_map(pieces, f.kind, b.p.size, f.channels, f.x);
  b.next.forward = pixel_part(f);
  b.next.grad = b.p.out;
  b.next.dx = g.dx;
  b.next.dweight = g.dpixel_weight;
  b.next.dbias = g.dpixel_bias;
  return b;
}
template <typename E>
const char* run(const SpatialAttentionBackwardParams& g, WorkspacePieces& pieces, void* stream) {
  const SpatialBackward b = take(pieces, g);
  const SpatialParams& p = b.p;
  SR_KERNELS_RETURN_IF_ERROR(run_statistics<E>(g.forward, p, stream));
  SR_KERNELS_RETURN_IF_ERROR(
      launch_threads(spatial_gate_gradient_kernel<E>, p.size.pixels(), stream, p));
  if (p.out.data != nullptr)
    SR_KERNELS_RETURN_IF_ERROR(
        launch_threads(spatial_input_gradient_kernel<E>, p.size.pixels(), stream, p));
  if (g.dweight != nullptr || g.dbias != nullptr) {
    const int taps = 2 * p.kernel * p.kernel + 1;
    SR_KERNELS_RETURN_IF_ERROR(launch_blocks(spatial_weight_gradient_kernel<E>, p.slices, taps,
                                             kBlockThreads / 32 * 4, stream, p));
    SR_KERNELS_RETURN_IF_ERROR(
        launch_threads(spatial_reduce_kernel<E>, taps, stream, static_cast<const float*>(p.taps),
                       p.slices, taps, static_cast<E*>(g.dweight), static_cast<E*>(g.dbias)));
  }
  return b.pixel ? run<E>(b.next, pieces, stream) : nullptr;
}

// ------------------------------------------------------------------ channel attention

// What forward and backward have in common.
ChannelParams channel_params(const ChannelAttentionParams& f) {
  ChannelParams p{};
  p.batch = f.batch;
  p.height = static_cast<int>(f.height);
  p.width = static_cast<int>(f.width);
  p.channels = static_cast<int>(f.channels);
  p.hidden = static_cast<int>(f.hidden);
  p.contrast = f.contrast;
  p.x = f.x;
  p.out = f.y;
  p.w_down = f.w_down;
  p.b_down = f.b_down;
  p.w_up = f.w_up;
  p.b_up = f.b_up;
  p.gate_out = f.gate;
  p.chunks = static_cast<int>(std::clamp<int64_t>(f.height * f.width / 2048, 1, 64));
  return p;
}
// Of two launches, with room for the parts of one.
ChannelParams take(WorkspacePieces& pieces, const ChannelAttentionParams& f,
                   const OnChipShares& shares) {
  ChannelParams p = channel_params(f);
  // What a block scales is more than what it reads to find the gates.
  p.share = std::max(256, 16 * p.chunks);
  p.parts = pieces.take<Moments>(f.batch * f.channels * std::max(p.chunks, shares.chunks));
  if (shares.chunks > 0) p.z = pieces.take<float>(f.batch * f.channels);
  return p;
}
ChannelParams take(WorkspacePieces& pieces, const ChannelAttentionBackwardParams& g) {
  ChannelParams p = channel_params(g.forward);
  p.parts = pieces.take<Moments>(p.batch * p.channels * p.chunks);
  p.out = g.dx;
  if (g.grad_of_gate) {
    p.gate_grad = g.grad.data;
    p.gate_grad_stride_n = g.grad.stride_n;
    p.gate_grad_stride_c = g.grad.stride_c;
  } else {
    p.grad = g.grad;
  }
  p.dw_down = g.dw_down;
  p.db_down = g.db_down;
  p.dw_up = g.dw_up;
  p.db_up = g.db_up;
  for (float** array : {&p.gate, &p.z, &p.up, &p.mean, &p.offset, &p.slope})
    *array = pieces.take<float>(p.batch * p.channels);
  for (float** array : {&p.hidden_values, &p.down}) *array = pieces.take<float>(p.batch * p.hidden);
  return p;
}
// One launch; kGridRefused where the driver will not have it.
template <typename E>
const char* run_on_chip(ChannelParams p, const OnChipShares& shares, void* stream) {
  p.chunks = shares.chunks;
  p.share = shares.share;
  return launch_cooperative(channel_attention_kernel<E>,
                            dim3(static_cast<unsigned>(p.chunks * p.batch)), kBlockThreads,
                            shares.shared_bytes, stream, p);
}
template <typename E>
const char* run_channels(const ChannelParams& p, bool backward, void* stream) {
  const int shared_bytes = (backward ? 2 : 1) * (p.channels + p.hidden) * 4;
  if (shared_bytes > kMaxSharedBytes)
    return "C + R channels of a gate must be fewer than 25344, backward 12672";
  const int64_t groups = ceil_div(p.channels, kWalkChannels);
  const int64_t image = static_cast<int64_t>(p.height) * p.width;
  SR_KERNELS_RETURN_IF_ERROR(launch_blocks(moments_kernel<E>, p.chunks * p.batch, groups,
                                           kBlockThreads * static_cast<int>(sizeof(Moments)),
                                           stream, p));
  if (!backward)
    return p.gate_out != nullptr
               ? launch_blocks(channel_gate_kernel<E>, p.batch, 1, shared_bytes, stream, p)
               : launch_blocks(channel_scale_kernel<E>, ceil_div(image, p.share) * p.batch, 1,
                               shared_bytes, stream, p);
  SR_KERNELS_RETURN_IF_ERROR(
      launch_blocks(channel_gate_gradient_kernel<E>, p.batch, 1, shared_bytes, stream, p));
  if (p.out.data != nullptr)
    SR_KERNELS_RETURN_IF_ERROR(launch_blocks(channel_input_gradient_kernel<E>,
                                             ceil_div(image * p.batch, kGradientPixels), groups, 0,
                                             stream, p));
  if (p.dw_down == nullptr && p.db_down == nullptr && p.dw_up == nullptr && p.db_up == nullptr)
    return nullptr;
  const int64_t weights = static_cast<int64_t>(p.channels) * p.hidden;
  return launch_threads(channel_weight_gradient_kernel<E>, 2 * weights + p.hidden + p.channels,
                        stream, p);
}

// ------------------------------------------------------------------ gated convolution

template <typename E>
const char* launch_gated(const GatedParams& p, void* stream) {
  const int64_t tiles =
      ceil_div(static_cast<int64_t>(p.height) * p.width, ConvTile<E>::kPixels) * p.batch;
  return launch_blocks(gated_conv_kernel<E>, tiles, ceil_div(p.m_count, kProductRows),
                       ConvTile<E>::kSharedBytes, stream, p);
}
template <typename E>
const char* run(const GatedConvParams& f, void* stream) {
  return launch_gated<E>(
      {f.batch, static_cast<int>(f.height), static_cast<int>(f.width), static_cast<int>(f.c_in),
       static_cast<int>(f.c_out), f.x, f.residual, f.y, f.gate, f.weight, f.bias, false, f.c_in, 1},
      stream);
}

GatedReduceParams take(WorkspacePieces& pieces, const GatedConvBackwardParams& g) {
  const GatedConvParams& f = g.forward;
  GatedReduceParams p{};
  p.batch = f.batch;
  p.m_count = f.c_out;
  p.k_count = f.c_in;
  p.slices = weight_gradient_slices(f.height * f.width, f.c_out, f.c_in);
  p.gate = f.gate;
  p.weight = f.weight;
  p.dweight = g.dweight;
  p.dgate = g.dgate;
  p.dbias = g.dbias;
  if (g.dweight != nullptr || g.dgate != nullptr)
    p.products = pieces.take<float>(p.batch * p.slices * p.m_count * p.k_count);
  if (g.dbias != nullptr) p.bias_parts = pieces.take<float>(p.batch * p.slices * p.m_count);
  return p;
}
template <typename E>
const char* run(const GatedConvBackwardParams& g, WorkspacePieces& pieces, void* stream) {
  const GatedConvParams& f = g.forward;
  const GatedReduceParams p = take(pieces, g);
  if (g.dx.data != nullptr)
    SR_KERNELS_RETURN_IF_ERROR(
        launch_gated<E>({f.batch, static_cast<int>(f.height), static_cast<int>(f.width),
                         static_cast<int>(f.c_out), static_cast<int>(f.c_in), g.grad, FeatureMap{},
                         g.dx, f.gate, f.weight, nullptr, true, 1, f.c_in},
                        stream));
  // By what is wanted: without an image there is no workspace, and gradients of zero.
  if (g.dweight == nullptr && g.dgate == nullptr && g.dbias == nullptr) return nullptr;
  const auto image = [](FeatureMap map, int64_t n) {
    map.data = static_cast<E*>(map.data) + n * map.stride_n;
    return map;
  };
  for (int64_t n = 0; n < f.batch; ++n) {
    const int64_t part = n * p.slices;
    const WeightGradient sums{
        f.c_out, f.c_in, p.slices,
        p.products == nullptr ? nullptr : p.products + part * f.c_out * f.c_in,
        p.bias_parts == nullptr ? nullptr : p.bias_parts + part * f.c_out};
    SR_KERNELS_RETURN_IF_ERROR(
        launch_weight_gradient_parts<E>(sums, image_size(1, f.height, f.width), image(g.grad, n),
                                        image(f.x, n), Shift(), Activation::kNone, 0.0f, stream));
  }
  return launch_threads(gated_reduce_kernel<E>, f.c_out * f.c_in + f.batch * f.c_in + f.c_out,
                        stream, p);
}

template <typename Params>
int64_t measure(const Params& p) {
  WorkspacePieces pieces(nullptr);
  take(pieces, p);
  return pieces.bytes();
}

}  // namespace

int64_t gate_workspace(const PixelAttentionBackwardParams& p) { return measure(p); }
int64_t gate_workspace(const SpatialAttentionParams& p) { return measure(p); }
int64_t gate_workspace(const SpatialAttentionBackwardParams& p) {
  WorkspacePieces pieces(nullptr);
  const SpatialBackward b = take(pieces, p);
  if (b.pixel) take(pieces, b.next);
  return pieces.bytes();
}
int64_t gate_workspace(const ChannelAttentionBackwardParams& p) { return measure(p); }
int64_t gate_workspace(const GatedConvBackwardParams& p) { return measure(p); }

// 0 chunks also where y is not wanted.
OnChipShares shares_on_chip(const ChannelAttentionParams& f) {
  OnChipShares shares{};
  if (f.gate != nullptr) return shares;
  for_kind(f.kind, [&](auto element) -> const char* {
    using E = decltype(element);
    shares = on_chip_shares(
        f.batch, f.height * f.width, static_cast<int>(f.channels), static_cast<int>(f.hidden),
        static_cast<int>(sizeof(E)), cooperative_multiprocessors(), [](int shared_bytes) {
          return resident_blocks(channel_attention_kernel<E>, kBlockThreads, shared_bytes);
        });
    return nullptr;
  });
  return shares;
}
int64_t gate_workspace(const ChannelAttentionParams& p, const OnChipShares& shares) {
  WorkspacePieces pieces(nullptr);
  take(pieces, p, shares);
  return pieces.bytes();
}

const char* launch_gate(const PixelAttentionParams& p, void* stream) {
  if (!fits(p, p.channels)) return kTooLarge;
  return for_kind(p.kind, [&](auto element) {
    return run<decltype(element)>(p, FeatureMap{}, p.y, FeatureMap{}, nullptr, nullptr, stream);
  });
}
const char* launch_gate(const PixelAttentionBackwardParams& p, void* workspace, void* stream) {
  if (!fits(p.forward, p.forward.channels)) return kTooLarge;
  WorkspacePieces pieces(workspace);
  return for_kind(p.forward.kind,
                  [&](auto element) { return run<decltype(element)>(p, pieces, stream); });
}
const char* launch_gate(const SpatialAttentionParams& p, void* workspace, void* stream) {
  if (!fits(p, p.channels) || p.kernel > 181) return kTooLarge;
  WorkspacePieces pieces(workspace);
  return for_kind(p.kind, [&](auto element) { return run<decltype(element)>(p, pieces, stream); });
}
const char* launch_gate(const SpatialAttentionBackwardParams& p, void* workspace, void* stream) {
  if (!fits(p.forward, p.forward.channels) || p.forward.kernel > 181) return kTooLarge;
  WorkspacePieces pieces(workspace);
  return for_kind(p.forward.kind,
                  [&](auto element) { return run<decltype(element)>(p, pieces, stream); });
}
const char* launch_gate(const ChannelAttentionParams& p, const OnChipShares& shares,
                        void* workspace, void* stream) {
  if (!fits(p, p.channels + p.hidden)) return kTooLarge;
  WorkspacePieces pieces(workspace);
  const ChannelParams c = take(pieces, p, shares);
  return for_kind(p.kind, [&](auto element) -> const char* {
    using E = decltype(element);
    if (shares.chunks > 0) {
      const char* error = run_on_chip<E>(c, shares, stream);
      if (error != kGridRefused) return error;
    }
    return run_channels<E>(c, false, stream);
  });
}
const char* launch_gate(const ChannelAttentionBackwardParams& p, void* workspace, void* stream) {
  if (!fits(p.forward, p.forward.channels + p.forward.hidden)) return kTooLarge;
  WorkspacePieces pieces(workspace);
  const ChannelParams c = take(pieces, p);
  return for_kind(p.forward.kind,
                  [&](auto element) { return run_channels<decltype(element)>(c, true, stream); });
}
const char* launch_gate(const GatedConvParams& p, void* stream) {
  if (!fits(p, p.c_in + p.c_out)) return kTooLarge;
  return for_kind(p.kind, [&](auto element) { return run<decltype(element)>(p, stream); });
}
const char* launch_gate(const GatedConvBackwardParams& p, void* workspace, void* stream) {
  if (!fits(p.forward, p.forward.c_in + p.forward.c_out)) return kTooLarge;
  WorkspacePieces pieces(workspace);
  return for_kind(p.forward.kind,
                  [&](auto element) { return run<decltype(element)>(p, pieces, stream); });
}

}  // namespace sr_kernels
