// Launches of the shift convolution's CUDA kernels. Each returns an error text, nullptr for
// success.
//
// stream: a cudaStream_t; the caller has made the tensors' device current. workspace: what the
// matching *_workspace function says, in bytes (0: may be nullptr), 256-byte aligned,
// uninitialised.
#pragma once

#include "shift_conv/params.h"

namespace sr_kernels {

const char* launch_shift_conv2d(const ShiftConvParams& params, void* stream);

int64_t shift_conv2d_backward_workspace(const ShiftConvBackwardParams& params);
const char* launch_shift_conv2d_backward(const ShiftConvBackwardParams& params, void* workspace,
                                         void* stream);

// One kernel, and no workspace, where its tile fits a block's shared memory and its sums the
// registers: up to 64 output channels and about as many inputs, in 16 bits 192. Wider ones run as
// two, with the hidden activations in the workspace.
int64_t shift_conv_block_workspace(const ShiftConvBlockParams& params);
const char* launch_shift_conv_block(const ShiftConvBlockParams& params, void* workspace,
                                    void* stream);

// Two kernels, and a workspace for sums of the weights' gradients alone, in 16 bits up to 192
// channels in and out; others are a sequence with two hidden maps in the workspace.
int64_t shift_conv_block_backward_workspace(const ShiftConvBlockBackwardParams& params);
const char* launch_shift_conv_block_backward(const ShiftConvBlockBackwardParams& params,
                                             void* workspace, void* stream);

}  // namespace sr_kernels
