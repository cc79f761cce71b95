// What the kernels of the channel moments see. No torch here.
#pragma once

#include "common/platform.h"

namespace sr_kernels {

// Over the pixels p of the whole batch, of which there is at least one:
//   mean[c] = mean_p x[c, p],  covariance[c, k] = mean_p (x[c, p] - mean[c]) (x[k, p] - mean[k])
struct ChannelMomentsParams {
  ScalarKind kind;
  int64_t batch, channels, height, width;
  FeatureMap x;
  double *mean, *covariance;  // (channels), (channels, channels); an input of the backward: mean
};

struct ChannelMomentsBackwardParams {
  ChannelMomentsParams forward;  // covariance unused
  const double *mean_gradient, *covariance_gradient;
  FeatureMap dx;
  // Gradients that reached x by other ways, or no data: they join dx. CPU kernels alone read them.
  FeatureMap others[2];
};

SR_KERNELS_DECLARE_FOR_EACH_ISA(
    void channel_moments(const ChannelMomentsParams& params, ParallelFor parallel);
    void channel_moments_backward(const ChannelMomentsBackwardParams& params,
                                  ParallelFor parallel);)

}  // namespace sr_kernels
