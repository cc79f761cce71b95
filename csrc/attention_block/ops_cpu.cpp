// sr_kernels::grouped_attention_block and apply_grouped_attention_block on the CPU.
#include "attention_block/operators.h"
#include "common/cpu_isa.h"

namespace sr_kernels {
namespace {

struct Cpu {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };
  static void run(const char*, const AttentionBlockParams& p, const Tensor&) {
    SR_KERNELS_CALL_CPU(attention_block, p, torch_parallel);
  }
};

}  // namespace
}  // namespace sr_kernels

STABLE_TORCH_LIBRARY_IMPL(sr_kernels, CPU, m) {
  sr_kernels::AttentionBlockOperators<sr_kernels::Cpu>::implement(m);
}
