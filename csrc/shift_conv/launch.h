// Launches of the shift convolution's CUDA kernels. Returns an error text, nullptr for success.
#pragma once

#include "shift_conv/params.h"

namespace sr_kernels {

// stream: a cudaStream_t. The caller has made the tensors' device current.
const char* launch_shift_conv2d(const ShiftConvParams& params, void* stream);

}  // namespace sr_kernels
