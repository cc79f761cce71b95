// Launches of the attention gates' CUDA kernels. Each returns an error text, nullptr for success.
//
// stream: a cudaStream_t; the caller has made the tensors' device current. workspace: what the
// matching gate_workspace() says, in bytes (0: may be nullptr), 256-byte aligned, uninitialised;
// the workspace of the params themselves is not used.
#pragma once

#include "attention_gates/params.h"

namespace sr_kernels {

int64_t gate_workspace(const PixelAttentionBackwardParams& params);
int64_t gate_workspace(const SpatialAttentionParams& params);
int64_t gate_workspace(const SpatialAttentionBackwardParams& params);
int64_t gate_workspace(const ChannelAttentionBackwardParams& params);
int64_t gate_workspace(const GatedConvBackwardParams& params);

const char* launch_gate(const PixelAttentionParams& params, void* stream);
const char* launch_gate(const PixelAttentionBackwardParams& params, void* workspace, void* stream);
const char* launch_gate(const SpatialAttentionParams& params, void* workspace, void* stream);
const char* launch_gate(const SpatialAttentionBackwardParams& params, void* workspace,
                        void* stream);
const char* launch_gate(const ChannelAttentionBackwardParams& params, void* workspace,
                        void* stream);
const char* launch_gate(const GatedConvParams& params, void* stream);
const char* launch_gate(const GatedConvBackwardParams& params, void* workspace, void* stream);

// Channel attention: shares_on_chip asks the current device, which takes a while: once a call.
OnChipShares shares_on_chip(const ChannelAttentionParams& params);
int64_t gate_workspace(const ChannelAttentionParams& params, const OnChipShares& shares);
const char* launch_gate(const ChannelAttentionParams& params, const OnChipShares& shares,
                        void* workspace, void* stream);

}  // namespace sr_kernels
