#include "shift_conv/launch.h"

#include "common/launch.cuh"
#include "common/weight_gradient.cuh"
#include "common/workspace.h"
#include "shift_conv/backward.cuh"
#include "shift_conv/block_backward.cuh"
#include "shift_conv/forward.cuh"

namespace sr_kernels {
namespace {

constexpr const char* kTooLarge =
    "the image is too large for a CUDA grid (H and W below 2^30, channels below 2^20)";

bool fits_a_grid(int64_t height, int64_t width, int64_t channels) {
  return height < 1 << 30 && width < 1 << 30 && channels < 1 << 20;
}

Shift shift_of(ShiftPattern pattern, int64_t channels, int groups) {
  Shift shift;
  shift.pattern = pattern;
  shift.channels = static_cast<int>(channels);
  shift.groups = groups;
  return shift;
}

template <typename E>
const char* launch_conv(const ConvParams& p, void* stream) {
  using Tile = ConvTile<E>;
  const int64_t blocks = (p.size.pixels() + Tile::kPixels - 1) / Tile::kPixels;
  const int64_t slices = (p.m_count + kProductRows - 1) / kProductRows;
  if (blocks > kMaxGridX || slices > kMaxGridYZ) return kTooLarge;
  if (blocks == 0) return nullptr;
  return launch_kernel(conv_kernel<E>,
                       dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(slices)),
                       kBlockThreads, Tile::kSharedBytes, stream, p);
}

// ------------------------------------------------------------------ shift_conv2d

// z = W S(x) + b, before any epilogue.
ConvParams conv_of(const ShiftConvParams& p) {
  ConvParams c{};
  c.size = image_size(p.batch, p.height, p.width);
  c.k_count = static_cast<int>(p.c_in);
  c.m_count = static_cast<int>(p.c_out);
  c.x = p.x;
  c.shift = shift_of(p.pattern, p.c_in, p.groups);
  c.weight = p.weight;
  c.weight_stride_m = p.c_in;
  c.weight_stride_k = 1;
  c.bias = p.bias;
  c.activation = p.activation;
  c.slope = static_cast<float>(p.negative_slope);
  return c;
}

// out = S^T(W^T dz), where W is (m_count of dz, k_count of out).
ConvParams transposed_conv(const ImageSize& size, const FeatureMap& dz, const void* weight,
                           int64_t dz_channels, int64_t out_channels, const Shift& shift,
                           const FeatureMap& out) {
  ConvParams c{};
  c.size = size;
  c.k_count = static_cast<int>(dz_channels);
  c.m_count = static_cast<int>(out_channels);
  c.x = dz;
  c.weight = weight;
  c.weight_stride_m = 1;
  c.weight_stride_k = out_channels;
  c.scatter = shift;
  c.out = out;
  return c;
}

template <typename E>
const char* run(const ShiftConvParams& p, void* stream) {
  ConvParams c = conv_of(p);
  c.residual = p.residual;
  c.out = p.y;
  return launch_conv<E>(c, stream);
}

struct ConvBackward {
  FeatureMap dz;
  WeightGradient gradient;
};
ConvBackward take(WorkspacePieces& pieces, const ShiftConvBackwardParams& p) {
  const ShiftConvParams& f = p.forward;
  ConvBackward b{p.grad, {}};
  if (f.activation != Activation::kNone)
    b.dz = take_map(pieces, f.kind, f.batch, f.c_out, f.height, f.width, f.x.stride_c == 1);
  b.gradient = take_weight_gradient(pieces, f.batch * f.height * f.width, f.c_out, f.c_in,
                                    p.dweight != nullptr, p.dbias != nullptr);
  return b;
}
template <typename E>
const char* run(const ShiftConvBackwardParams& p, void* workspace, void* stream) {
  const ShiftConvParams& f = p.forward;
  const ImageSize size = image_size(f.batch, f.height, f.width);
  const Shift shift = shift_of(f.pattern, f.c_in, f.groups);
  WorkspacePieces pieces(workspace);
  const ConvBackward b = take(pieces, p);
  if (f.activation != Activation::kNone) {
    ConvParams c = conv_of(f);
    c.grad = p.grad;
    c.out = b.dz;
    SR_KERNELS_RETURN_IF_ERROR(launch_conv<E>(c, stream));
  }
  if (p.dx.data != nullptr)
    SR_KERNELS_RETURN_IF_ERROR(launch_conv<E>(
        transposed_conv(size, b.dz, f.weight, f.c_out, f.c_in, shift, p.dx), stream));
  return launch_weight_gradient<E>(b.gradient, size, b.dz, f.x, shift, Activation::kNone, 0.0f,
                                   p.dweight, p.dbias, stream);
}

// ------------------------------------------------------------------ shift_conv_block

// The first product as a convolution of its own, without its activation.
ShiftConvParams first_conv(const ShiftConvBlockParams& p, const FeatureMap& out) {
  ShiftConvParams c{};
  c.kind = p.kind;
  c.batch = p.batch;
  c.height = p.height;
  c.width = p.width;
  c.c_in = p.c_in;
  c.c_out = p.c_hidden;
  c.pattern = p.pattern;
  c.groups = p.groups;
  c.activation = Activation::kNone;
  c.negative_slope = p.negative_slope;
  c.x = p.x;
  c.weight = p.w0;
  c.bias = p.b0;
  c.y = out;
  return c;
}

template <typename E>
int units_in_one_kernel(const ShiftConvBlockParams& p) {
  const int64_t channels = p.c_in < 4096 ? p.c_in : 4096;
  if (p.c_out <= 64 && BlockTile<E, 1>::shared_bytes(static_cast<int>(channels)) <= kMaxSharedBytes)
    return 1;
  if (sizeof(E) == 2 && p.c_out <= 192 &&
      BlockTile<E, 3>::shared_bytes(static_cast<int>(channels)) <= kMaxSharedBytes)
    return 3;
  return 0;
}
int units_in_one_kernel(const ShiftConvBlockParams& p) {
  return p.kind == ScalarKind::kFloat32 ? units_in_one_kernel<float>(p)
                                        : units_in_one_kernel<__half>(p);
}

template <typename E, int kOut>
const char* launch_block(const ShiftConvBlockParams& p, void* stream) {
  using Tile = BlockTile<E, kOut>;
  BlockParams b{};
  b.size = image_size(p.batch, p.height, p.width);
  b.c_in = static_cast<int>(p.c_in);
  b.c_hidden = static_cast<int>(p.c_hidden);
  b.c_out = static_cast<int>(p.c_out);
  b.x = p.x;
  b.y = p.y;
  b.w0 = p.w0;
  b.b0 = p.b0;
  b.w1 = p.w1;
  b.b1 = p.b1;
  b.shift_in = shift_of(p.pattern, p.c_in, p.groups);
  b.shift_hidden = shift_of(p.pattern, p.c_hidden, p.groups);
  b.activation = p.activation;
  b.slope = static_cast<float>(p.negative_slope);
  b.residual = p.residual;
  const int64_t blocks = (p.width + Tile::kColumns - 1) / Tile::kColumns *
                         ((p.height + Tile::kRows - 1) / Tile::kRows) * p.batch;
  if (blocks > kMaxGridX) return kTooLarge;
  if (blocks == 0) return nullptr;
  return launch_kernel(block_kernel<E, kOut>, dim3(static_cast<unsigned>(blocks)), kBlockThreads,
                       static_cast<int>(Tile::shared_bytes(b.c_in)), stream, b);
}

FeatureMap take_hidden(WorkspacePieces& pieces, const ShiftConvBlockParams& p) {
  return take_map(pieces, p.kind, p.batch, p.c_hidden, p.height, p.width, p.x.stride_c == 1);
}

template <typename E>
const char* run(const ShiftConvBlockParams& p, void* workspace, void* stream) {
  const int units = units_in_one_kernel<E>(p);
  if (units == 1) return launch_block<E, 1>(p, stream);
  if constexpr (sizeof(E) == 2)
    if (units == 3) return launch_block<E, 3>(p, stream);
  WorkspacePieces pieces(workspace);
  ShiftConvParams first = first_conv(p, take_hidden(pieces, p));
  first.activation = p.activation;
  SR_KERNELS_RETURN_IF_ERROR(run<E>(first, stream));
  ShiftConvParams second = first;
  second.c_in = p.c_hidden;
  second.c_out = p.c_out;
  second.activation = Activation::kNone;
  second.x = first.y;
  second.weight = p.w1;
  second.bias = p.b1;
  second.residual = p.residual ? p.x : FeatureMap{};
  second.y = p.y;
  return run<E>(second, stream);
}

// Units of 64 channels that the kernels of block_backward.cuh keep sums of, 0: the sequence runs.
template <typename E>
int units_in_fused_backward(const ShiftConvBlockParams& p) {
  const int64_t channels = p.c_in > p.c_out ? p.c_in : p.c_out;
  if (sizeof(E) != 2 || channels > 192) return 0;
  return channels <= 64 ? 1 : 3;
}
int units_in_fused_backward(const ShiftConvBlockParams& p) {
  return p.kind == ScalarKind::kFloat32 ? units_in_fused_backward<float>(p)
                                        : units_in_fused_backward<__half>(p);
}
// How many blocks share the tiles: at least 8 tiles for each, and about 512 blocks in all, 256 of
// those that are alone on a multiprocessor.
int slices_of_fused_backward(const ShiftConvBlockParams& p, int units) {
  const int64_t tiles = HiddenTile<__half>::count(image_size(p.batch, p.height, p.width));
  const int64_t chunks = (p.c_hidden + kProductRows - 1) / kProductRows;
  const int64_t most = (units == 1 ? 512 : 256) / chunks;
  const int64_t slices = tiles / 8 < most ? tiles / 8 : most;
  return static_cast<int>(slices < 1 ? 1 : slices);
}

struct BlockBackward {
  int units;  // 0: the sequence, with these maps
  bool need_z, need_dz;
  FeatureMap z, dz;
  WeightGradient first, second;
};
BlockBackward take(WorkspacePieces& pieces, const ShiftConvBlockBackwardParams& p) {
  const ShiftConvBlockParams& f = p.forward;
  const int64_t pixels = f.batch * f.height * f.width;
  BlockBackward b{};
  b.units = units_in_fused_backward(f);
  if (b.units > 0) {
    const int slices = slices_of_fused_backward(f, b.units);
    b.first = take_parts(pieces, slices, f.c_hidden, f.c_in, p.dw0 != nullptr, p.db0 != nullptr);
    b.second = take_parts(pieces, slices, f.c_out, f.c_hidden, p.dw1 != nullptr, p.db1 != nullptr);
    return b;
  }
  b.need_dz = p.dx.data != nullptr || p.dw0 != nullptr || p.db0 != nullptr;
  b.need_z = p.dw1 != nullptr || (b.need_dz && f.activation != Activation::kNone);
  if (b.need_z) b.z = take_hidden(pieces, f);
  if (b.need_dz) b.dz = take_hidden(pieces, f);
  b.first =
      take_weight_gradient(pieces, pixels, f.c_hidden, f.c_in, p.dw0 != nullptr, p.db0 != nullptr);
  b.second =
      take_weight_gradient(pieces, pixels, f.c_out, f.c_hidden, p.dw1 != nullptr, p.db1 != nullptr);
  return b;
}

template <typename E, int kUnits>
const char* launch_fused_backward(const ShiftConvBlockBackwardParams& p, const BlockBackward& take,
                                  void* stream) {
  using Tile = HiddenTile<E>;
  const ShiftConvBlockParams& f = p.forward;
  BlockBackwardParams b{};
  b.size = image_size(f.batch, f.height, f.width);
  b.c_in = static_cast<int>(f.c_in);
  b.c_hidden = static_cast<int>(f.c_hidden);
  b.c_out = static_cast<int>(f.c_out);
  b.x = f.x;
  b.grad = p.grad;
  b.dx = p.dx;
  b.w0 = f.w0;
  b.b0 = f.b0;
  b.w1 = f.w1;
  b.shift_in = shift_of(f.pattern, f.c_in, f.groups);
  b.shift_hidden = shift_of(f.pattern, f.c_hidden, f.groups);
  b.activation = f.activation;
  b.slope = static_cast<float>(f.negative_slope);
  b.residual = f.residual;
  b.slices = take.first.slices;
  b.dw0_parts = take.first.weight_parts;
  b.db0_parts = take.first.bias_parts;
  b.dw1_parts = take.second.weight_parts;
  b.db1_parts = take.second.bias_parts;
  const int64_t blocks = Tile::count(b.size);
  if (blocks + b.slices > kMaxGridX) return kTooLarge;  // the kernels count them in int
  if (p.dx.data != nullptr && blocks > 0)
    SR_KERNELS_RETURN_IF_ERROR(launch_kernel(block_input_gradient_kernel<E, kUnits>,
                                             dim3(static_cast<unsigned>(blocks)), kBlockThreads,
                                             Tile::input_gradient_bytes(f.activation), stream, b));
  if (p.dw0 == nullptr && p.db0 == nullptr && p.dw1 == nullptr && p.db1 == nullptr) return nullptr;
  const int64_t chunks = (f.c_hidden + kProductRows - 1) / kProductRows;
  SR_KERNELS_RETURN_IF_ERROR(
      launch_kernel(block_weight_gradient_kernel<E, kUnits>,
                    dim3(static_cast<unsigned>(b.slices), static_cast<unsigned>(chunks)),
                    kBlockThreads, Tile::weight_gradient_bytes(kUnits), stream, b));
  SR_KERNELS_RETURN_IF_ERROR(launch_reduction<E>(take.first, p.dw0, p.db0, stream));
  return launch_reduction<E>(take.second, p.dw1, p.db1, stream);
}

// z = W0 S(x) + b0 is computed again; dz = S^T(W1^T G) act'(z), dx = S^T(W0^T dz) + G.
template <typename E>
const char* run(const ShiftConvBlockBackwardParams& p, void* workspace, void* stream) {
  const ShiftConvBlockParams& f = p.forward;
  const ImageSize size = image_size(f.batch, f.height, f.width);
  const Shift shift_in = shift_of(f.pattern, f.c_in, f.groups);
  const Shift shift_hidden = shift_of(f.pattern, f.c_hidden, f.groups);
  const auto slope = static_cast<float>(f.negative_slope);
  WorkspacePieces pieces(workspace);
  const BlockBackward b = take(pieces, p);
  if constexpr (sizeof(E) == 2) {
    if (b.units == 1) return launch_fused_backward<E, 1>(p, b, stream);
    if (b.units == 3) return launch_fused_backward<E, 3>(p, b, stream);
  }
  if (b.need_z) SR_KERNELS_RETURN_IF_ERROR(run<E>(first_conv(f, b.z), stream));
  if (b.need_dz) {
    ConvParams c = transposed_conv(size, p.grad, f.w1, f.c_out, f.c_hidden, shift_hidden, b.dz);
    if (f.activation != Activation::kNone) c.before = b.z;
    c.before_activation = f.activation;
    c.slope = slope;
    SR_KERNELS_RETURN_IF_ERROR(launch_conv<E>(c, stream));
  }
  if (p.dx.data != nullptr) {
    ConvParams c = transposed_conv(size, b.dz, f.w0, f.c_hidden, f.c_in, shift_in, p.dx);
    if (f.residual) c.residual = p.grad;
    SR_KERNELS_RETURN_IF_ERROR(launch_conv<E>(c, stream));
  }
  SR_KERNELS_RETURN_IF_ERROR(launch_weight_gradient<E>(
      b.first, size, b.dz, f.x, shift_in, Activation::kNone, 0.0f, p.dw0, p.db0, stream));
  return launch_weight_gradient<E>(b.second, size, p.grad, b.z, shift_hidden, f.activation, slope,
                                   p.dw1, p.db1, stream);
}

}  // namespace

const char* launch_shift_conv2d(const ShiftConvParams& p, void* stream) {
  if (!fits_a_grid(p.height, p.width, p.c_in + p.c_out)) return kTooLarge;
  return for_kind(p.kind, [&](auto element) { return run<decltype(element)>(p, stream); });
}

int64_t shift_conv2d_backward_workspace(const ShiftConvBackwardParams& p) {
  WorkspacePieces pieces(nullptr);
  take(pieces, p);
  return pieces.bytes();
}
const char* launch_shift_conv2d_backward(const ShiftConvBackwardParams& p, void* workspace,
                                         void* stream) {
  if (!fits_a_grid(p.forward.height, p.forward.width, p.forward.c_in + p.forward.c_out))
    return kTooLarge;
  return for_kind(p.forward.kind,
                  [&](auto element) { return run<decltype(element)>(p, workspace, stream); });
}

int64_t shift_conv_block_workspace(const ShiftConvBlockParams& p) {
  if (units_in_one_kernel(p) > 0) return 0;
  WorkspacePieces pieces(nullptr);
  take_hidden(pieces, p);
  return pieces.bytes();
}
const char* launch_shift_conv_block(const ShiftConvBlockParams& p, void* workspace, void* stream) {
  if (!fits_a_grid(p.height, p.width, p.c_in + p.c_hidden + p.c_out)) return kTooLarge;
  return for_kind(p.kind,
                  [&](auto element) { return run<decltype(element)>(p, workspace, stream); });
}

int64_t shift_conv_block_backward_workspace(const ShiftConvBlockBackwardParams& p) {
  WorkspacePieces pieces(nullptr);
  take(pieces, p);
  return pieces.bytes();
}
const char* launch_shift_conv_block_backward(const ShiftConvBlockBackwardParams& p, void* workspace,
                                             void* stream) {
  const ShiftConvBlockParams& f = p.forward;
  if (!fits_a_grid(f.height, f.width, f.c_in + f.c_hidden + f.c_out)) return kTooLarge;
  return for_kind(f.kind,
                  [&](auto element) { return run<decltype(element)>(p, workspace, stream); });
}

}  // namespace sr_kernels
