// Launch of the 3x3 convolution's CUDA kernels. Returns an error text, nullptr for success.
//
// stream: a cudaStream_t; the caller has made the tensors' device current. workspace: what
// conv3x3_workspace says, in bytes, 256-byte aligned, uninitialised.
#pragma once

#include "conv3x3/params.h"

namespace sr_kernels {

int64_t conv3x3_workspace(const Conv3x3Params& params);
const char* launch_conv3x3(const Conv3x3Params& params, void* workspace, void* stream);

}  // namespace sr_kernels
