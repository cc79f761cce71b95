// Accesses to global memory by more than one element, and copies to shared memory that do not pass
// through registers.
#pragma once

#include <type_traits>

#include "common/ptx.cuh"

namespace sr_kernels {

// function(width), width being the most elements of E, as a constant, that one access may take
// where all of `places` (addresses and strides in elements, combined with |) are multiples of it:
// 16 bytes, 8 bytes, or one element.
template <typename E, typename Function>
SR_DEVICE void with_access_width(uint64_t places, const Function& function) {
  constexpr int kMost = 16 / static_cast<int>(sizeof(E));
  if (places % kMost == 0)
    function(std::integral_constant<int, kMost>{});
  else if (places % (kMost / 2) == 0)
    function(std::integral_constant<int, kMost / 2>{});
  else
    function(std::integral_constant<int, 1>{});
}

// An address for `places` above.
template <typename E>
SR_HOST_DEVICE uint64_t place_of(const void* address) {
  return reinterpret_cast<uint64_t>(address) / sizeof(E);
}

// Waits for this thread's copies, then for all threads: what any of them copied or stored is there.
SR_DEVICE void finish_copies() {
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
}

}  // namespace sr_kernels
