// Which copy of the CPU kernels runs on this machine. Used by the operators, not by the kernels.
#pragma once

namespace sr_kernels {

enum class CpuIsa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// Decided once: the best that both this build and this processor have. The environment variable
// SR_KERNELS_CPU_ISA = portable | avx2 | avx512 asks for another one; std::runtime_error where
// that one cannot run.
CpuIsa cpu_isa();

}  // namespace sr_kernels

#if defined(SR_KERNELS_X86)
#define SR_KERNELS_CALL_CPU(function, ...)  \
  do {                                      \
    switch (::sr_kernels::cpu_isa()) {      \
      case ::sr_kernels::CpuIsa::kAvx512:   \
        avx512::function(__VA_ARGS__);      \
        break;                              \
      case ::sr_kernels::CpuIsa::kAvx2:     \
        avx2::function(__VA_ARGS__);        \
        break;                              \
      case ::sr_kernels::CpuIsa::kPortable: \
        portable::function(__VA_ARGS__);    \
        break;                              \
    }                                       \
  } while (false)
#else
#define SR_KERNELS_CALL_CPU(function, ...) portable::function(__VA_ARGS__)
#endif
