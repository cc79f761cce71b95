// Small kernels with one fault each, and their right forms: what the emulator must catch and let
// pass.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "common/async_copy.cuh"
#include "common/cooperative.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"

namespace py = pybind11;
using namespace sr_kernels;

namespace {

constexpr int kThreads = 64;

enum Fault : int {
  kNone = 0,
  kNoBarrier = 1,          // a __syncthreads left out
  kSharedPastEnd = 2,      // a shared array read past its end
  kGlobalPastEnd = 3,      // a global array read past its end
  kGlobalBefore = 4,       // and written before its beginning
  kUnwritten = 5,          // shared memory read that nobody wrote
  kBarrierInBranch = 6,    // a barrier that half of the threads reach
  kEarlyReturn = 7,        // threads that are gone when the others wait
  kOverwrite = 8,          // written again while others may still read
  kNoWarpBarrier = 9,      // a __syncwarp left out
  kMisaligned = 10,        // a vector at an address that is not a multiple of its size
  kNoWait = 11,            // an asynchronous copy that is not waited for
  kLeftOnTheWay = 12,      // and one that is never waited for
  kDivergentShuffle = 13,  // lanes of one warp at different instructions
  kRawPointer = 14,        // shared memory touched round the checks
  kMisalignedGlobal = 15,  // a vector in global memory at such an address
  kMisalignedFrom = 16,    // an asynchronous copy from such an address
  kMisalignedTo = 17,      // and one to such an address
};

// out[i] = in[n - 1 - i]: through shared memory, so that every thread needs what another one wrote.
void reverse_kernel(const float* in, float* out, int n, int fault) {
  const int thread = static_cast<int>(threadIdx.x);
  float* staged = shared_array<float>(0, kThreads);
  float* spare = shared_array<float>(512, kThreads);
  if (fault == kEarlyReturn && thread >= 32) return;
  const int from = fault == kGlobalPastEnd ? thread + 1 : thread;
  if (fault == kUnwritten) {
    if (thread > 0) store_shared<float>(staged + thread, 0.0f);
  } else if (fault == kNoWait || fault == kLeftOnTheWay) {
    copy_async<4>(staged + thread, in + thread, true);
    copy_async_commit();
    if (fault == kLeftOnTheWay) {
      store_shared<float>(spare + thread, 0.0f);
      staged = spare;
    }
  } else if (fault == kMisalignedFrom || fault == kMisalignedTo) {
    const int to = fault == kMisalignedTo ? 2 : 0;
    copy_async<16>(staged + thread / 4 * 4 + to, in + thread / 4 * 4 + 2 - to, true);
  } else {
    store_shared<float>(staged + thread, load_global<float>(in + from));
  }
  if (fault != kNoBarrier) __syncthreads();
  if (fault == kBarrierInBranch && thread < 32) __syncthreads();
  if (fault == kRawPointer) {
    out[thread] = staged[thread];
    return;
  }
  const int index = fault == kSharedPastEnd ? n - thread : n - 1 - thread;
  float value = load_shared<float>(staged + index);
  if (fault == kMisaligned)
    value = load_shared<Vector<float, 2>>(staged + thread / 2 * 2 + 1).element[0];
  if (fault == kMisalignedGlobal)
    value = load_global<Vector<float, 2>>(in + thread / 2 * 2 + 1).element[0];
  if (fault == kOverwrite) store_shared<float>(staged + thread, value);
  if (fault == kDivergentShuffle) {
    if (thread % 2 == 0)
      value = __shfl_xor_sync(kFullWarp, value, 2);
    else
      value = __shfl_down_sync(kFullWarp, value, 2);
  }
  if (fault == kNoWarpBarrier || fault == kNone) {
    store_shared<float>(spare + thread, value);
    if (fault == kNone) __syncwarp();
    value = load_shared<float>(spare + (thread ^ 1));
    if (fault == kNone) __syncwarp();
    store_shared<float>(spare + thread, value);
    if (fault == kNone) __syncwarp();
    value = load_shared<float>(spare + (thread ^ 1));
  }
  store_global<float>(out + (fault == kGlobalBefore ? thread - 1 : thread), value);
}

// The sum of all threads' values, right or with a barrier left out, through memory that the
// emulator does not watch: its order of threads alone shows the fault.
void unwatched_sum_kernel(const float* in, float* out, float* staged, int n, bool with_barrier) {
  const int thread = static_cast<int>(threadIdx.x);
  staged[thread] = in[thread];
  if (with_barrier) __syncthreads();
  if (thread != 0) return;
  float sum = 0.0f;
  for (int i = 0; i < n; ++i) sum += staged[i];
  out[0] = sum;
}

// 16 x 16 elements, by one warp.
template <typename E>
void copy_matrix(E* to, int ld, const E* from, int lane) {
  constexpr int kPieces = 16 * static_cast<int>(sizeof(E)) / 16, kWidth = 16 / kPieces;
  for (int i = lane; i < 16 * kPieces; i += 32)
    copy_async<16>(to + i / kPieces * ld + i % kPieces * kWidth, from + i * kWidth, true);
}

// c (16 x 8) = a (16 x 16) b (16 x 8), by one warp. wrong: a fragment index off by one row group.
template <typename E>
void product_kernel(const E* a, const E* b, float* c, int form, bool wrong) {
  const int lane = static_cast<int>(threadIdx.x);
  constexpr int kStride = conflict_free_stride(16);
  E* left = shared_array<E>(0, 16 * kStride);
  E* right = shared_array<E>(1024, 16 * kStride);
  if (form == 0) {  // a row by row, b as [k][n]
    copy_matrix(left, kStride, a, lane);
    copy_matrix(right, kStride, b, lane);
    copy_async_commit();
    copy_async_wait<0>();
  } else {  // both transposed in shared memory
    for (int i = lane; i < 256; i += 32) {
      store_shared<E>(left + i % 16 * kStride + i / 16, load_global<E>(a + i));
      store_shared<E>(right + i % 16 * kStride + i / 16, load_global<E>(b + i));
    }
  }
  __syncwarp();
  FragmentA fa;
  FragmentB fb[2];
  if (form == 0) {
    load_a_from_rows_m(fa, left, kStride, lane);
    load_b_from_rows_k(fb, right, kStride, lane);
  } else {
    load_a_from_rows_k(fa, left, kStride, lane);
    load_b_from_rows_n(fb, right, kStride, lane);
  }
  for (int half = 0; half < 2; ++half) {
    Accumulator d;
    multiply_add<E>(d, fa, fb[half]);
    for (int i = 0; i < 4; ++i) {
      const int row = accumulator_row(lane, wrong ? i ^ 2 : i);
      store_global<float>(c + row * 16 + half * 8 + accumulator_column(lane, i), d.x[i]);
    }
  }
}

void reductions_kernel(const float* in, float* out) {
  const int thread = static_cast<int>(threadIdx.x);
  float* partial = shared_array<float>(0, kThreads / 32);
  const float x = load_global<float>(in + thread);
  const float sum = block_sum(x, partial, thread, kThreads);
  const float largest = warp_maximum(x);
  const float next = __shfl_sync(kFullWarp, x, (thread + 1) % 32);
  const unsigned positive = __ballot_sync(kFullWarp, x > 0.0f);
  store_global<float>(out + thread, sum);
  store_global<float>(out + kThreads + thread, largest);
  store_global<float>(out + 2 * kThreads + thread, next);
  store_global<float>(out + 3 * kThreads + thread, positive >> (thread % 32) & 1 ? 1.0f : 0.0f);
}

enum GridFault : int {
  kNoGridFault = 0,
  kNoGridBarrier = 1,      // a barrier of the grid left out
  kBlockReturns = 2,       // one that a block does not reach
  kThreadsReturn = 3,      // or half of its threads
  kOrdinaryLaunch = 4,     // blocks that are not all there
  kTooManyBlocks = 5,      // more than there is room for
  kOverwrittenInGrid = 6,  // written again while other blocks may still read
};
struct GridSum {
  const float* in;
  float *parts, *out;
  int fault;
};

// out[b][i] = the sum of in[.][i] over all blocks, through global memory, less in[b][n - 1 - i],
// which lasts in b's shared memory.
void grid_sum_kernel(GridSum p) {
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  float* own = shared_array<float>(0, kThreads);
  const float value = load_global<float>(p.in + block * kThreads + thread);
  store_shared<float>(own + thread, value);
  store_global<float>(p.parts + block * kThreads + thread, value);
  if (p.fault == kBlockReturns && block == 1) return;
  if (p.fault == kThreadsReturn && block == 1 && thread >= 32) return;
  if (p.fault != kNoGridBarrier) sync_grid();
  float sum = 0.0f;
  for (int i = 0; i < static_cast<int>(gridDim.x); ++i)
    sum += load_global<float>(p.parts + i * kThreads + thread);
  if (p.fault == kOverwrittenInGrid) store_global<float>(p.parts + block * kThreads + thread, 0.0f);
  if (p.fault == kNoGridBarrier) __syncthreads();
  sum -= load_shared<float>(own + kThreads - 1 - thread);
  sync_grid();
  store_global<float>(p.out + block * kThreads + thread, sum);
}

using Floats = py::array_t<float, py::array::c_style>;
using Shorts = py::array_t<uint16_t, py::array::c_style>;

}  // namespace

PYBIND11_MODULE(planted, m) {
  m.def("set_schedule", &cuda_on_cpu::set_schedule);
  m.def("reverse", [](Floats in, Floats out, int fault) {
    const cuda_on_cpu::Memory a(in.data(), in.nbytes()), b(out.data(), out.nbytes());
    launch_kernel(reverse_kernel, dim3(1), kThreads, 1024, nullptr, in.data(), out.mutable_data(),
                  kThreads, fault);
  });
  m.def("unwatched_sum", [](Floats in, Floats out, Floats staged, bool with_barrier) {
    launch_kernel(unwatched_sum_kernel, dim3(1), kThreads, 0, nullptr, in.data(),
                  out.mutable_data(), staged.mutable_data(), kThreads, with_barrier);
  });
  m.def("product", [](Shorts a, Shorts b, Floats c, bool bfloat16, int form, bool wrong) {
    const cuda_on_cpu::Memory ma(a.data(), a.nbytes()), mb(b.data(), b.nbytes()),
        mc(c.data(), c.nbytes());
    if (bfloat16)
      launch_kernel(product_kernel<__nv_bfloat16>, dim3(1), 32, 2048, nullptr,
                    reinterpret_cast<const __nv_bfloat16*>(a.data()),
                    reinterpret_cast<const __nv_bfloat16*>(b.data()), c.mutable_data(), form,
                    wrong);
    else
      launch_kernel(product_kernel<__half>, dim3(1), 32, 2048, nullptr,
                    reinterpret_cast<const __half*>(a.data()),
                    reinterpret_cast<const __half*>(b.data()), c.mutable_data(), form, wrong);
  });
  m.def("set_device", &cuda_on_cpu::set_device, py::arg("multiprocessors"), py::arg("shared_bytes"),
        py::arg("cooperative_error") = 0);
  m.def("grid_sum", [](Floats in, Floats parts, Floats out, int fault) {
    const cuda_on_cpu::Memory a(in.data(), in.nbytes()), b(parts.data(), parts.nbytes()),
        c(out.data(), out.nbytes());
    const GridSum p{in.data(), parts.mutable_data(), out.mutable_data(), fault};
    const dim3 grid(static_cast<unsigned>(in.shape(0)));
    const int shared = fault == kTooManyBlocks ? kMaxSharedBytes : 512;
    if (fault == kOrdinaryLaunch)
      launch_kernel(grid_sum_kernel, grid, kThreads, shared, nullptr, p);
    else
      launch_cooperative(grid_sum_kernel, grid, kThreads, shared, nullptr, p);
  });
  m.def("reductions", [](Floats in, Floats out) {
    const cuda_on_cpu::Memory a(in.data(), in.nbytes()), b(out.data(), out.nbytes());
    launch_kernel(reductions_kernel, dim3(1), kThreads, 512, nullptr, in.data(),
                  out.mutable_data());
  });
  m.def("refused", [](unsigned y, int threads, int shared) {
    launch_kernel(unwatched_sum_kernel, dim3(1, y), threads, shared, nullptr, nullptr, nullptr,
                  nullptr, 0, false);
  });
}
