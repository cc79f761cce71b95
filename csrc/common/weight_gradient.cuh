// Host code of a 1x1 product's weight gradients on CUDA, in two stages: the sums of each of
// `slices` parts of the pixels (weight_gradient_kernel), then these added in order (reduce_kernel).
// Both kernels are the shift convolution's; gates use them without a shift.
#pragma once

#include "common/launch.cuh"
#include "common/workspace.h"
#include "shift_conv/backward.cuh"

namespace sr_kernels {

inline ImageSize image_size(int64_t batch, int64_t height, int64_t width) {
  return {batch, static_cast<int>(height), static_cast<int>(width)};
}

inline int64_t weight_gradient_chunks(int64_t m_count, int64_t k_count) {
  return (m_count + kProductRows - 1) / kProductRows * ((k_count + 63) / 64);
}
// How many blocks share the pixels: about 512 blocks in all, and at least 4 tiles for each.
inline int weight_gradient_slices(int64_t pixels, int64_t m_count, int64_t k_count) {
  const int64_t tiles = (pixels + 63) / 64, most = 512 / weight_gradient_chunks(m_count, k_count);
  const int64_t slices = tiles / 4 < most ? tiles / 4 : most;
  return static_cast<int>(slices < 1 ? 1 : slices);
}

// Where the parts lie: (slices, m_count, k_count) and (slices, m_count); nullptr: not wanted.
struct WeightGradient {
  int64_t m_count, k_count;
  int slices;
  float *weight_parts, *bias_parts;
};
inline WeightGradient take_parts(WorkspacePieces& pieces, int slices, int64_t m_count,
                                 int64_t k_count, bool weight, bool bias) {
  WeightGradient g{m_count, k_count, slices, nullptr, nullptr};
  if (weight) g.weight_parts = pieces.take<float>(g.slices * m_count * k_count);
  if (bias) g.bias_parts = pieces.take<float>(g.slices * m_count);
  return g;
}
inline WeightGradient take_weight_gradient(WorkspacePieces& pieces, int64_t pixels, int64_t m_count,
                                           int64_t k_count, bool weight, bool bias) {
  return take_parts(pieces, weight_gradient_slices(pixels, m_count, k_count), m_count, k_count,
                    weight, bias);
}

// The parts of dW = dz act(S(x))^T and db = sum dz.
template <typename E>
const char* launch_weight_gradient_parts(const WeightGradient& g, const ImageSize& size,
                                         const FeatureMap& dz, const FeatureMap& x,
                                         const Shift& shift, Activation activation, float slope,
                                         void* stream) {
  const WeightGradientParams p{size,
                               static_cast<int>(g.m_count),
                               static_cast<int>(g.k_count),
                               dz,
                               x,
                               shift,
                               activation,
                               slope,
                               g.slices,
                               g.weight_parts,
                               g.bias_parts};
  const int64_t chunks = weight_gradient_chunks(g.m_count, g.k_count);
  if (chunks > kMaxGridYZ) return "too many channels for a CUDA grid";
  if (chunks == 0) return nullptr;
  return launch_kernel(weight_gradient_kernel<E>,
                       dim3(static_cast<unsigned>(g.slices), static_cast<unsigned>(chunks)),
                       kBlockThreads, WeightGradientTile<E>::kSharedBytes, stream, p);
}

// dW and db from their parts, dense, in the type of x; nullptr: not wanted.
template <typename E>
const char* launch_reduction(const WeightGradient& g, void* dweight, void* dbias, void* stream) {
  const auto reduce = [&](const float* parts, int64_t count, void* out) -> const char* {
    const int64_t blocks = (count + kBlockThreads - 1) / kBlockThreads;
    if (out == nullptr || blocks == 0) return nullptr;
    return launch_kernel(reduce_kernel<E>, dim3(static_cast<unsigned>(blocks)), kBlockThreads, 0,
                         stream, parts, g.slices, count, static_cast<E*>(out));
  };
  SR_KERNELS_RETURN_IF_ERROR(reduce(g.weight_parts, g.m_count * g.k_count, dweight));
  return reduce(g.bias_parts, g.m_count, dbias);
}

// Both stages.
template <typename E>
const char* launch_weight_gradient(const WeightGradient& g, const ImageSize& size,
                                   const FeatureMap& dz, const FeatureMap& x, const Shift& shift,
                                   Activation activation, float slope, void* dweight, void* dbias,
                                   void* stream) {
  if (dweight == nullptr && dbias == nullptr) return nullptr;
  SR_KERNELS_RETURN_IF_ERROR(
      launch_weight_gradient_parts<E>(g, size, dz, x, shift, activation, slope, stream));
  return launch_reduction<E>(g, dweight, dbias, stream);
}

}  // namespace sr_kernels
