// Launch of the attention block on CUDA. Returns an error text, nullptr for success.
//
// stream: a cudaStream_t; the caller has made the tensors' device current. workspace:
// attention_block_workspace() bytes, 256-byte aligned, uninitialised.
#pragma once

#include "attention_block/params.h"

namespace sr_kernels {

int64_t attention_block_workspace(const AttentionBlockParams& params);
const char* launch_attention_block(const AttentionBlockParams& params, void* workspace,
                                   void* stream);

}  // namespace sr_kernels
