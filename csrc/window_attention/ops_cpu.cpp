// sr_kernels::window_attention, grouped_window_attention, the reuse of their scores and their
// backwards on the CPU.
#include "common/cpu_isa.h"
#include "window_attention/operators.h"

namespace sr_kernels {
namespace {

struct Cpu {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };
  static void run(const char*, const std::vector<WindowAttentionParams>& groups, bool reuse,
                  const Tensor&) {
    std::vector<WindowAttentionParams> all = groups;
    if (reuse)  // the softmax is made again; lse is an input, not to be written
      for (WindowAttentionParams& p : all) p.lse = FeatureMap{};
    SR_KERNELS_CALL_CPU(window_attention, all.data(), static_cast<int64_t>(all.size()),
                        torch_parallel);
  }
  static void run(const char*, const std::vector<WindowAttentionBackwardParams>& groups,
                  const Tensor&) {
    SR_KERNELS_CALL_CPU(window_attention_backward, groups.data(),
                        static_cast<int64_t>(groups.size()), torch_parallel);
  }
};

}  // namespace
}  // namespace sr_kernels

STABLE_TORCH_LIBRARY_IMPL(sr_kernels, CPU, m) {
  sr_kernels::WindowAttentionOperators<sr_kernels::Cpu>::implement(m);
  sr_kernels::WindowAttentionOperators<sr_kernels::Cpu>::implement_for_cpu(m);
}
