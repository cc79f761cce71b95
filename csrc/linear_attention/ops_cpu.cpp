// sr_kernels::linear_attention_block on the CPU.
#include "common/cpu_isa.h"
#include "linear_attention/operators.h"

namespace sr_kernels {
namespace {

struct Cpu {
  static void run(const LinearAttentionParams& p) {
    SR_KERNELS_CALL_CPU(linear_attention_block, p, torch_parallel);
  }
};

}  // namespace
}  // namespace sr_kernels

STABLE_TORCH_LIBRARY_IMPL(sr_kernels, CPU, m) {
  sr_kernels::LinearAttentionOperators<sr_kernels::Cpu>::implement(m);
}
