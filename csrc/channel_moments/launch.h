// Launches of the channel moments' CUDA kernels. Each returns an error text, nullptr for success.
//
// stream: a cudaStream_t; the caller has made the tensors' device current. workspace: what the
// matching channel_moments_workspace() says, in bytes, 256-byte aligned, uninitialised.
#pragma once

#include "channel_moments/params.h"

namespace sr_kernels {

int64_t channel_moments_workspace(const ChannelMomentsParams& params);
int64_t channel_moments_workspace(const ChannelMomentsBackwardParams& params);
const char* launch_channel_moments(const ChannelMomentsParams& params, void* workspace,
                                   void* stream);
const char* launch_channel_moments(const ChannelMomentsBackwardParams& params, void* workspace,
                                   void* stream);

}  // namespace sr_kernels
