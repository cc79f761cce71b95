// Launches of the window attention's CUDA kernels. Each returns an error text, nullptr for success.
//
// stream: a cudaStream_t; the caller has made the tensors' device current. A call takes a list of
// groups, as the CPU kernels do.
#pragma once

#include "window_attention/params.h"

namespace sr_kernels {

// reuse: the log-sum-exp of every group is read, where the kernel can use it, and not written.
const char* launch_window_attention(const WindowAttentionParams* groups, int64_t group_count,
                                    bool reuse, void* stream);

// workspace: window_attention_backward_workspace() bytes, 256-byte aligned, uninitialised.
int64_t window_attention_backward_workspace(const WindowAttentionBackwardParams* groups,
                                            int64_t group_count);
const char* launch_window_attention_backward(const WindowAttentionBackwardParams* groups,
                                             int64_t group_count, void* workspace, void* stream);

}  // namespace sr_kernels
