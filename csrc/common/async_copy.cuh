// Copies of dense rows from global to shared memory that do not pass through registers.
#pragma once

#include "common/ptx.cuh"

namespace sr_kernels {

// Copies `rows` rows of `columns` elements from `from` (rows ld_from apart) to `to` (ld_to apart),
// by all threads of the block, 16 bytes at a time: columns, ld_from, ld_to and both addresses must
// be multiples of 16 bytes. The caller commits and waits.
template <typename E>
SR_DEVICE void copy_rows_async(E* to, int ld_to, const E* from, int64_t ld_from, int rows,
                               int columns, int thread, int threads) {
  constexpr int kElements = 16 / static_cast<int>(sizeof(E));
  const int pieces = columns / kElements;
  for (int i = thread; i < rows * pieces; i += threads) {
    const int row = i / pieces, column = i % pieces * kElements;
    copy_async<16>(to + row * ld_to + column, from + row * ld_from + column, true);
  }
}

}  // namespace sr_kernels
