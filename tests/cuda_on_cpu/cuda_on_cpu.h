// Runs CUDA kernels on the CPU, every thread of a block a fiber, one block after the other; those
// of a cooperative launch in turn, from one barrier of the grid to the next.
//
// How a kernel author uses it. Write the kernel against csrc/common/*.cuh: those headers include
// this one where the compiler is not nvcc, and everything that plain C++ lacks has one name there
// with a branch for each. Then
//
//   * shared memory is what `shared_array<T>(byte_offset, count)` returns, and is touched only
//   through
//     `load_shared`, `store_shared`, ldmatrix and the asynchronous copies: the pointers lead
//     nowhere here (reading through one is a segmentation fault), so nothing can go round the
//     checks;
//   * global memory is read and written with `load_global` and `store_global`;
//   * all 32 lanes of a warp take part in every warp-wide instruction, and all threads of the block
//   in
//     every `__syncthreads()`; threads do not return before the last of these;
//   * blocks know nothing of each other's progress, unless launch_cooperative
//   (common/cooperative.cuh)
//     starts them: then all are alive at once, and `sync_grid()` waits for all of their threads;
//   * `launch_kernel` (common/launch.cuh) starts it, so that launch.cu, grid arithmetic included,
//   is
//     compiled and run here as it stands. Bind it as bind_shift_conv.cpp does, with `Memory` around
//     each array, and test it under several `set_schedule` orders.
//
// What is an error: a read of shared memory that nothing wrote (a new block's is poisoned, NaN in
// every format), that lies outside of every shared_array, or that an asynchronous copy is still
// filling; two threads at one place of which one writes, with no barrier between (`__syncwarp` is
// one within a warp); a misaligned access; a global access outside of every array given with
// `Memory`; a barrier or warp-wide instruction that not all threads reach, or reach at different
// places, and one of the grid that not all blocks reach; in a cooperative launch, two blocks at one
// place of global memory of which one writes, with no barrier of the grid between; a launch that a
// GPU (`set_device`) would refuse. Threads and blocks run in an order that can be turned
// round or shuffled, so that results that hang on it show as well. An error ends the launch as a
// C++ exception that names block and thread.
//
// What it cannot show: speed, a compiler's mistakes, and whatever another kernel does at the same
// time.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// CUDA's own headers keep these where they are defined before.
#define __device__
#define __host__
#define __global__
#define __constant__
#define __shared__ shared_memory_comes_from_shared_array_only
#include <driver_types.h>
#include <vector_types.h>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __align__
#define __align__(n) __attribute__((aligned(n)))

#include <cuda_bf16.h>
#include <cuda_fp16.h>

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_on_cpu {

// What every architecture from sm_80 to sm_120 has: 99 KiB a block.
constexpr int kMaxSharedBytes = 99 * 1024;
constexpr int kMaxThreads = 1024;

// The GPU: its multiprocessors (0: none that launches cooperatively) and the shared memory of each;
// the error that its driver has for every cooperative launch; how often it was asked for its
// multiprocessors.
struct Device {
  int multiprocessors = 4, shared_bytes = 228 * 1024;
  cudaError_t cooperative_error = cudaSuccess;
  int64_t questions = 0;
};
inline Device device;
inline void set_device(int multiprocessors, int shared_bytes, int cooperative_error) {
  device = {multiprocessors, shared_bytes, static_cast<cudaError_t>(cooperative_error),
            device.questions};
}
// Blocks that a multiprocessor holds at once. The driver keeps 1 KiB of each for itself.
inline int resident_blocks(int threads, int64_t shared_bytes) {
  return static_cast<int>(
      std::min<int64_t>(2048 / threads, device.shared_bytes / (shared_bytes + 1024)));
}

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  ((out << parts), ...);
  return out.str();
}

// ------------------------------------------------------------------ in which order threads run

enum class Order { kForward, kReversed, kShuffled };

struct Schedule {
  Order order = Order::kForward;
  std::mt19937_64 random{0};

  template <typename Items>
  void arrange(Items& items) {
    if (order == Order::kReversed) std::reverse(items.begin(), items.end());
    if (order == Order::kShuffled) std::shuffle(items.begin(), items.end(), random);
  }
};
inline Schedule schedule;

inline void set_schedule(const std::string& order, uint64_t seed) {
  if (order == "forward")
    schedule.order = Order::kForward;
  else if (order == "reversed")
    schedule.order = Order::kReversed;
  else if (order == "shuffled")
    schedule.order = Order::kShuffled;
  else
    throw std::invalid_argument("order must be forward, reversed or shuffled, got " + order);
  schedule.random.seed(seed);
}

// ------------------------------------------------------------------ global memory

struct Range {
  const char *begin, *end;
};
inline std::vector<Range> allocations;

// One array that kernels may touch, for as long as this lives.
class Memory {
 public:
  Memory(const void* data, size_t bytes) {
    if (data != nullptr && bytes > 0)
      allocations.push_back(
          {static_cast<const char*>(data), static_cast<const char*>(data) + bytes});
    else
      registered_ = false;
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    if (registered_) allocations.pop_back();  // they leave in the opposite order
  }

 private:
  bool registered_ = true;
};

// What the blocks of a cooperative launch do in global memory between two barriers of the grid.
class GridWatch {
 public:
  void barrier() { ++time_; }

  // A block that is at one of these places, too, with one of both writing; -1: none.
  int64_t touch(const char* begin, int bytes, int64_t block, bool writes) {
    for (int i = 0; i < bytes; i += kPlaceBytes) {
      Place& at = places_[reinterpret_cast<uintptr_t>(begin + i) / kPlaceBytes];
      if (at.write_time == time_ && at.writer != block) return at.writer;
      const bool read = at.read_time == time_;
      if (writes) {
        if (read && (at.readers > 1 || at.reader != block)) return at.reader;
        at.writer = block;
        at.write_time = time_;
      } else {
        at.readers = !read ? 1 : at.reader == block ? at.readers : 2;
        at.reader = block;
        at.read_time = time_;
      }
    }
    return -1;
  }

 private:
  static constexpr int kPlaceBytes = 2;
  struct Place {
    int64_t writer = 0, reader = 0;
    uint32_t write_time = 0, read_time = 0;
    int readers = 0;  // 2: several
  };
  std::unordered_map<uintptr_t, Place> places_;
  uint32_t time_ = 1;
};
inline std::unique_ptr<GridWatch> grid_watch;  // there while a cooperative launch lasts

// ------------------------------------------------------------------ fibers

enum class State { kReady, kAtBarrier, kAtWarp, kDone };

struct PendingCopy {
  int offset;
  const void* source;
  int bytes;
  bool valid;
};

struct Thread {
  int index = 0;
  uint3 position{};
  State state = State::kReady;
  void* stack = nullptr;
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;
  std::vector<PendingCopy> uncommitted;
  std::deque<std::vector<PendingCopy>> committed;
#if !defined(__x86_64__)
  ucontext_t context;
#endif
};

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 512 * 1024;
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif

#if defined(__x86_64__)
// What a function call preserves, and the stack pointer. swapcontext would add two system calls.
extern "C" void cuda_on_cpu_switch(void** save, void* load);
asm(R"(
.text
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");
#endif

// ------------------------------------------------------------------ shared memory

// What is known of two bytes of shared memory. Times count the barriers of the block and of a warp.
struct Cell {
  bool declared = false, written = false, arriving = false;
  uint8_t readers = 0;  // since `read_time`: 0 none, 1 one thread, 2 one warp, 3 several warps
  uint16_t writer = 0, reader = 0;
  uint32_t write_time = 0, write_warp_time = 0, read_time = 0, read_warp_time = 0;
};
constexpr int kCellBytes = 2;

struct Warp {
  const char* op = nullptr;
  int line = 0;
  int arrived = 0;
  void* slots[32] = {};
  uint32_t time = 1;
};

class Block {
 public:
  int threads = 0, shared_bytes = 0;
  std::vector<Warp> warps;
  Thread* current = nullptr;

  Block() {
    void* nowhere = mmap(nullptr, kMaxSharedBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (nowhere == MAP_FAILED) throw std::bad_alloc();
    addresses_ = static_cast<char*>(nowhere);
    storage_.resize(kMaxSharedBytes);
    cells_.resize(kMaxSharedBytes / kCellBytes);
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() {
    munmap(addresses_, kMaxSharedBytes);
    for (const auto& fiber : fibers_) {
#if defined(__SANITIZE_ADDRESS__)
      __asan_unpoison_memory_region(fiber->stack, kStackBytes);  // of frames that never returned
#endif
      munmap(fiber->stack, kStackBytes);
    }
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(text("block (", blockIdx.x, ", ", blockIdx.y, ", ", blockIdx.z,
                                  ") thread ", current->index, ": ", what));
  }

  // ---- running

  // From the first thread to the last, of a launch whose blocks do not wait for each other.
  void run(int64_t number, int thread_count, int shared, const std::function<void()>& body) {
    begin(number, thread_count, shared, body);
    advance();
  }

  // A block, of which nothing has run yet.
  void begin(int64_t number, int thread_count, int shared, const std::function<void()>& body) {
    number_ = number;
    threads = thread_count;
    shared_bytes = shared;
    body_ = &body;
    failure_ = nullptr;
    time_ = 1;
    done_ = 0;
    barrier_line_ = 0;
    warps.assign(threads / 32, Warp());
    std::memset(storage_.data(), 0xff, storage_.size());
    std::fill(cells_.begin(), cells_.begin() + (shared + 1) / kCellBytes, Cell());
    arrays_.clear();
    while (static_cast<int>(fibers_.size()) < threads) fibers_.push_back(new_fiber());
    std::vector<Thread*> order;
    for (int i = 0; i < threads; ++i) {
      prepare(*fibers_[i], i);
      order.push_back(fibers_[i].get());
    }
    schedule.arrange(order);
    ready_.assign(order.begin(), order.end());
  }

  // Until all threads have returned, or (false) wait for the other blocks.
  bool advance() {
    while (!ready_.empty()) {
      Thread* next = ready_.front();
      ready_.pop_front();
      resume(*next);
      if (failure_) std::rethrow_exception(failure_);
      if (next->state == State::kDone) ++done_;
      if (at_barrier_ == threads && barrier_name_ == kOfBlock) release_barrier();
    }
    if (done_ < threads && at_barrier_ < threads) stuck();
    return done_ == threads;
  }

  // ---- barriers

  void sync_threads(const char* file, int line) { sync(kOfBlock, file, line); }
  void sync_grid(const char* file, int line) {
    if (!grid_watch) fail("is at a sync_grid, but the launch is not cooperative");
    sync(kOfGrid, file, line);
  }
  bool waits() const { return barrier_line_ != 0; }
  std::string barrier() const {
    return text(barrier_name_, " (", barrier_file_, ":", barrier_line_, ")");
  }
  void release_barrier() {
    at_barrier_ = 0;
    barrier_line_ = 0;
    ++time_;
    std::vector<Thread*> order;
    for (int i = 0; i < threads; ++i) {
      fibers_[i]->state = State::kReady;
      order.push_back(fibers_[i].get());
    }
    schedule.arrange(order);
    ready_.assign(order.begin(), order.end());
  }

  // Every lane brings a slot; the last one to arrive combines them all.
  template <typename Combine>
  void collective(const char* op, int line, uint32_t mask, void* slot, const Combine& combine) {
    if (mask != 0xffffffffu) fail(text(op, " with a mask that is not the full warp"));
    Warp& warp = warps[current->index / 32];
    if (warp.arrived > 0 && (line != warp.line || std::strcmp(op, warp.op) != 0))
      fail(text("is at ", op, " (line ", line, "), other lanes of its warp at ", warp.op, " (line ",
                warp.line, ")"));
    warp.op = op;
    warp.line = line;
    warp.slots[current->index % 32] = slot;
    if (++warp.arrived < 32) {
      wait(State::kAtWarp);
      return;
    }
    warp.arrived = 0;
    combine(warp.slots);
    std::vector<Thread*> others;
    for (int lane = 0; lane < 32; ++lane) {
      Thread* other = fibers_[current->index / 32 * 32 + lane].get();
      if (other != current) others.push_back(other);
    }
    schedule.arrange(others);
    for (Thread* other : others) {
      other->state = State::kReady;
      ready_.push_back(other);
    }
  }

  // ---- shared memory

  void* declare(int offset, int64_t bytes) {
    if (offset < 0 || offset % 16 != 0 || bytes < 0 || offset + bytes > shared_bytes)
      fail(text("shared_array of ", bytes, " bytes at offset ", offset, ", but the block has ",
                shared_bytes, " bytes (and offsets are multiples of 16)"));
    const std::pair<int, int64_t> array{offset, bytes};
    if (std::find(arrays_.begin(), arrays_.end(), array) == arrays_.end()) {
      arrays_.push_back(array);
      for (int64_t i = offset; i < offset + bytes; i += kCellBytes)
        cells_[i / kCellBytes].declared = true;
    }
    return addresses_ + offset;
  }

  void read(const void* pointer, void* value, int bytes) {
    const int offset = offset_of(pointer, bytes, "read");
    for (int i = offset; i < offset + bytes; i += kCellBytes) check_read(i);
    std::memcpy(value, storage_.data() + offset, bytes);
  }

  void write(void* pointer, const void* value, int bytes) {
    const int offset = offset_of(pointer, bytes, "write");
    for (int i = offset; i < offset + bytes; i += kCellBytes) check_write(i);
    std::memcpy(storage_.data() + offset, value, bytes);
  }

  // ---- asynchronous copies: the bytes arrive when they are waited for

  void copy_async(void* pointer, const void* source, int bytes, bool valid) {
    const int offset = offset_of(pointer, bytes, "asynchronous copy");
    if (valid) check_global(source, bytes, "asynchronous copy");
    for (int i = offset; i < offset + bytes; i += kCellBytes) {
      check_write(i);
      cells_[i / kCellBytes].arriving = true;
    }
    current->uncommitted.push_back({offset, source, bytes, valid});
  }
  void commit() {
    current->committed.push_back(std::move(current->uncommitted));
    current->uncommitted.clear();
  }
  void wait_for_copies(int still_on_their_way) {
    while (static_cast<int>(current->committed.size()) > still_on_their_way) {
      for (const PendingCopy& copy : current->committed.front()) {
        for (int i = copy.offset; i < copy.offset + copy.bytes; i += kCellBytes) {
          cells_[i / kCellBytes].arriving = false;
          check_write(i);
        }
        if (copy.valid)
          std::memcpy(storage_.data() + copy.offset, copy.source, copy.bytes);
        else
          std::memset(storage_.data() + copy.offset, 0, copy.bytes);
      }
      current->committed.pop_front();
    }
  }

  // ---- global memory

  void check_global(const void* pointer, int bytes, const char* what) const {
    const char* begin = static_cast<const char*>(pointer);
    if (reinterpret_cast<uintptr_t>(begin) % bytes != 0)
      fail(text("misaligned global ", what, " of ", bytes, " bytes at ", pointer));
    for (const Range& range : allocations)
      if (begin >= range.begin && begin + bytes <= range.end) {
        if (grid_watch) watch(range, begin, bytes, what);
        return;
      }
    if (allocations.empty()) fail("global access, but no array was given with Memory");
    const Range* nearest = &allocations[0];
    const auto distance = [begin](const Range& r) {
      return begin < r.begin ? r.begin - begin : begin - r.end;
    };
    for (const Range& range : allocations)
      if (distance(range) < distance(*nearest)) nearest = &range;
    fail(text("out-of-bounds global ", what, " of ", bytes, " bytes, at byte ",
              begin - nearest->begin, " of an array of ", nearest->end - nearest->begin));
  }

 private:
  void watch(const Range& range, const char* begin, int bytes, const std::string& what) const {
    if (what == "atomic") return;
    const int64_t other = grid_watch->touch(begin, bytes, number_, what == "write");
    if (other >= 0)
      fail(text("race: global ", what, " of ", bytes, " bytes, at byte ", begin - range.begin,
                " of an array of ", range.end - range.begin, ", where block ", other,
                " is too, one of them writing, and no sync_grid is between"));
  }

  int offset_of(const void* pointer, int bytes, const char* what) const {
    const int64_t offset = static_cast<const char*>(pointer) - addresses_;
    if (offset < 0 || offset + bytes > shared_bytes)
      fail(text("out-of-bounds shared ", what, " of ", bytes, " bytes at byte ", offset, " of ",
                shared_bytes));
    if (offset % bytes != 0)
      fail(text("misaligned shared ", what, " of ", bytes, " bytes at byte ", offset));
    for (int64_t i = offset; i < offset + bytes; i += kCellBytes)
      if (!cells_[i / kCellBytes].declared)
        fail(text("out-of-bounds shared ", what, " at byte ", i, ", between arrays"));
    return static_cast<int>(offset);
  }

  // Whether something at (thread, time, warp_time) is ordered before what the current thread does.
  bool ordered(int thread, uint32_t time, uint32_t warp_time) const {
    return thread == current->index || time != time_ ||
           (thread / 32 == current->index / 32 && warp_time != warps[thread / 32].time);
  }

  void check_read(int byte) {
    Cell& cell = cells_[byte / kCellBytes];
    if (cell.arriving)
      fail(text("shared byte ", byte, " is read while an asynchronous copy fills it"));
    if (!cell.written) fail(text("shared byte ", byte, " is read before it is written"));
    if (!ordered(cell.writer, cell.write_time, cell.write_warp_time))
      fail(text("race: shared byte ", byte, " is read, thread ", cell.writer,
                " wrote it, and no barrier is between"));
    const int self = current->index;
    const uint32_t warp_time = warps[self / 32].time;
    if (cell.readers == 0 || cell.read_time != time_) {
      cell.readers = 1;
      cell.read_time = time_;
    } else if (cell.reader / 32 != self / 32) {
      cell.readers = 3;
    } else if (cell.readers < 3 && cell.read_warp_time != warp_time) {
      cell.readers = 1;
    } else if (cell.reader != self && cell.readers < 2) {
      cell.readers = 2;
    }
    cell.reader = static_cast<uint16_t>(self);
    cell.read_warp_time = warp_time;
  }

  void check_write(int byte) {
    Cell& cell = cells_[byte / kCellBytes];
    if (cell.arriving)
      fail(text("shared byte ", byte, " is written while an asynchronous copy fills it"));
    if (cell.written && !ordered(cell.writer, cell.write_time, cell.write_warp_time))
      fail(text("race: shared byte ", byte, " is written, thread ", cell.writer,
                " wrote it, and no barrier is between"));
    if (cell.readers > 0 && cell.read_time == time_) {
      const bool others_warp =
          cell.readers == 3 || (cell.reader / 32 != current->index / 32 && cell.readers > 0);
      const bool others_lane = cell.reader / 32 == current->index / 32 &&
                               cell.read_warp_time == warps[cell.reader / 32].time &&
                               (cell.readers == 2 || cell.reader != current->index);
      if (others_warp || others_lane)
        fail(text("race: shared byte ", byte, " is written, thread ", cell.reader,
                  " or another read it, and no barrier is between"));
    }
    cell.written = true;
    cell.readers = 0;
    cell.writer = static_cast<uint16_t>(current->index);
    cell.write_time = time_;
    cell.write_warp_time = warps[current->index / 32].time;
  }

  void sync(const char* name, const char* file, int line) {
    if (barrier_line_ != 0 && (line != barrier_line_ || std::strcmp(file, barrier_file_) != 0))
      fail(text("is at the ", name, " of ", file, ":", line, ", others at ", barrier()));
    barrier_name_ = name;
    barrier_line_ = line;
    barrier_file_ = file;
    ++at_barrier_;
    wait(State::kAtBarrier);
  }

  [[noreturn]] void stuck() {
    int at_warp = 0;
    const char* op = "";
    for (int i = 0; i < threads; ++i)
      if (fibers_[i]->state == State::kAtWarp) {
        ++at_warp;
        op = warps[i / 32].op;
      }
    std::string where = text(done_, " have returned, ", at_barrier_, " wait");
    if (barrier_line_ != 0) where += " at " + barrier();
    if (at_warp > 0) where += text(", ", at_warp, " at ", op);
    throw std::runtime_error(text("block (", blockIdx.x, ", ", blockIdx.y, ", ", blockIdx.z,
                                  "): not all threads reach the same barrier: of ", threads, ", ",
                                  where));
  }

  // ---- switching

  std::unique_ptr<Thread> new_fiber() {
    auto fiber = std::make_unique<Thread>();
    // The lowest page stays closed: a stack that grows too far is a fault, not a silent overwrite.
    char* memory = static_cast<char*>(mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, 4096, PROT_NONE);
    fiber->stack = memory;
    return fiber;
  }

  void prepare(Thread& fiber, int index) {
    fiber.index = index;
    fiber.position.x = index % blockDim.x;
    fiber.position.y = index / blockDim.x % blockDim.y;
    fiber.position.z = index / (blockDim.x * blockDim.y);
    fiber.state = State::kReady;
    fiber.fake_stack = nullptr;
    fiber.uncommitted.clear();
    fiber.committed.clear();
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(static_cast<char*>(fiber.stack) + kStackBytes);
    *--top = nullptr;  // entry() never returns; this aligns the stack as a call would
    *--top = reinterpret_cast<void*>(&Block::entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber.stack_pointer = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::entry, 0);
#endif
  }

  static void entry();

  void resume(Thread& fiber) {
    current = &fiber;
    threadIdx = fiber.position;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fiber.stack, kStackBytes);
#endif
#if defined(__x86_64__)
    cuda_on_cpu_switch(&scheduler_, fiber.stack_pointer);
#else
    swapcontext(&scheduler_context_, &fiber.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  void wait(State state) {
    Thread& self = *current;
    self.state = state;
    leave(self, state == State::kDone);
    arrived(self);
  }
  void leave(Thread& self, [[maybe_unused]] bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &self.fake_stack, scheduler_stack_,
                                   scheduler_stack_bytes_);
#endif
#if defined(__x86_64__)
    cuda_on_cpu_switch(&self.stack_pointer, scheduler_);
#else
    swapcontext(&self.context, &scheduler_context_);
#endif
  }
  void arrived([[maybe_unused]] Thread& self) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(self.fake_stack, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
  }

  void body() {
    Thread& self = *current;
    arrived(self);
    try {
      (*body_)();
      if (!self.uncommitted.empty() || !self.committed.empty())
        fail("returns while asynchronous copies of it are on their way");
    } catch (...) {
      failure_ = std::current_exception();
    }
    wait(State::kDone);
  }

  char* addresses_ = nullptr;  // of shared memory: distinct, and not to be read through
  std::vector<char> storage_;
  std::vector<Cell> cells_;
  std::vector<std::pair<int, int64_t>> arrays_;
  std::vector<std::unique_ptr<Thread>> fibers_;
  std::deque<Thread*> ready_;
  const std::function<void()>* body_ = nullptr;
  std::exception_ptr failure_;
  uint32_t time_ = 1;
  static constexpr const char *kOfBlock = "__syncthreads", *kOfGrid = "sync_grid";
  int64_t number_ = 0;
  int done_ = 0, at_barrier_ = 0, barrier_line_ = 0;
  const char *barrier_name_ = kOfBlock, *barrier_file_ = "";
  void* scheduler_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
#if !defined(__x86_64__)
  ucontext_t scheduler_context_;
#endif
};

inline std::vector<std::unique_ptr<Block>> blocks;  // kept from launch to launch
inline Block* block = nullptr;                      // that whose thread is running

inline void Block::entry() {
  block->body();
  std::abort();  // a fiber that is done is not resumed
}

inline int64_t most_shared_bytes = 0;  // of a block, of all launches since it was set to 0

// A launch, of which a GPU would refuse the wrong ones.
class Launch {
 public:
  Launch(dim3 grid, int threads, int64_t shared_bytes) : grid_(grid) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
        grid.z > 65535)
      throw std::runtime_error(
          text("grid (", grid.x, ", ", grid.y, ", ", grid.z, ") is not one that a GPU takes"));
    if (threads <= 0 || threads > kMaxThreads || threads % 32 != 0)
      throw std::runtime_error(
          text(threads, " threads a block: must be a multiple of 32, <= 1024"));
    if (shared_bytes < 0 || shared_bytes > kMaxSharedBytes)
      throw std::runtime_error(
          text(shared_bytes, " bytes of shared memory: a block has at most ", kMaxSharedBytes));
    most_shared_bytes = std::max(most_shared_bytes, shared_bytes);
    gridDim = grid;
    blockDim = dim3(threads, 1, 1);
    order.resize(static_cast<size_t>(grid.x) * grid.y * grid.z);
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
    schedule.arrange(order);
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;
  // Fresh blocks after an error, which leaves barriers half full and fibers in mid-air.
  ~Launch() {
    grid_watch.reset();
    if (!done) blocks.clear();
  }

  // Makes a block the one that runs, as blocks[slot].
  Block& enter(int64_t number, int64_t slot) const {
    while (static_cast<int64_t>(blocks.size()) <= slot) blocks.push_back(std::make_unique<Block>());
    blockIdx.x = static_cast<unsigned>(number % grid_.x);
    blockIdx.y = static_cast<unsigned>(number / grid_.x % grid_.y);
    blockIdx.z = static_cast<unsigned>(number / grid_.x / grid_.y);
    block = blocks[slot].get();
    return *block;
  }

  std::vector<int64_t> order;  // of blocks
  bool done = false;

 private:
  dim3 grid_;
};
inline int64_t launches = 0, cooperative_launches = 0;

// Calls kernel(params...) for every thread of every block. An error of a thread is thrown from
// here.
template <typename... Formal, typename... Params>
void launch(void (*kernel)(Formal...), dim3 grid, int threads, int64_t shared_bytes,
            const Params&... params) {
  Launch launched(grid, threads, shared_bytes);
  const std::function<void()> body = [&] { kernel(params...); };
  for (const int64_t i : launched.order)
    launched.enter(i, 0).run(i, threads, static_cast<int>(shared_bytes), body);
  launched.done = true;
  ++launches;
}

// The same with all blocks at once: from barrier of the grid to barrier of the grid in turn.
// Returns the device's error, if it has one for such launches, and has run nothing then.
template <typename... Formal, typename... Params>
cudaError_t launch_cooperative(void (*kernel)(Formal...), dim3 grid, int threads,
                               int64_t shared_bytes, const Params&... params) {
  if (device.cooperative_error != cudaSuccess) return device.cooperative_error;
  Launch launched(grid, threads, shared_bytes);
  const int64_t count = static_cast<int64_t>(launched.order.size());
  const int64_t most = int64_t{device.multiprocessors} * resident_blocks(threads, shared_bytes);
  if (count > most)
    throw std::runtime_error(
        text("a cooperative launch of ", count, " blocks: the GPU has room for ", most));
  const std::function<void()> body = [&] { kernel(params...); };
  grid_watch = std::make_unique<GridWatch>();
  for (const int64_t i : launched.order)
    launched.enter(i, i).begin(i, threads, static_cast<int>(shared_bytes), body);
  for (;;) {
    int64_t returned = 0;
    for (const int64_t i : launched.order) returned += launched.enter(i, i).advance() ? 1 : 0;
    if (returned == count) break;
    if (returned > 0) {
      const auto waiting = std::find_if(launched.order.begin(), launched.order.end(),
                                        [](int64_t i) { return blocks[i]->waits(); });
      throw std::runtime_error(text("deadlock: of ", count, " blocks ", returned,
                                    " have returned, the others wait at ",
                                    blocks[*waiting]->barrier()));
    }
    grid_watch->barrier();
    schedule.arrange(launched.order);
    for (const int64_t i : launched.order) blocks[i]->release_barrier();
  }
  launched.done = true;
  ++cooperative_launches;
  return cudaSuccess;
}

// ------------------------------------------------------------------ instructions

inline int lane() { return block->current->index % 32; }

// Lane `lane` gets the value of lane from(lane).
template <typename T, typename From>
T shuffle(const char* op, int line, uint32_t mask, T value, const From& from) {
  static_assert(std::is_trivially_copyable<T>::value, "shuffles move plain values");
  struct Slot {
    T in, out;
  } slot{value, value};
  block->collective(op, line, mask, &slot, [&](void** slots) {
    for (int i = 0; i < 32; ++i) {
      const int source = from(i);
      auto* mine = static_cast<Slot*>(slots[i]);
      mine->out = source >= 0 && source < 32 ? static_cast<Slot*>(slots[source])->in : mine->in;
    }
  });
  return slot.out;
}

// __shfl_sync, whose lanes each name the lane that they want.
template <typename T>
T gather(int line, uint32_t mask, T value, int source, int width) {
  struct Slot {
    T in, out;
    int source;
  } slot{value, value, source};
  block->collective("__shfl_sync", line, mask, &slot, [width](void** slots) {
    for (int i = 0; i < 32; ++i) {
      auto* mine = static_cast<Slot*>(slots[i]);
      mine->out = static_cast<Slot*>(slots[i / width * width + (mine->source & (width - 1))])->in;
    }
  });
  return slot.out;
}

inline uint32_t ballot(const char* op, int line, uint32_t mask, bool predicate) {
  struct Slot {
    bool in;
    uint32_t out;
  } slot{predicate, 0};
  block->collective(op, line, mask, &slot, [](void** slots) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i)
      bits |= static_cast<uint32_t>(static_cast<Slot*>(slots[i])->in) << i;
    for (int i = 0; i < 32; ++i) static_cast<Slot*>(slots[i])->out = bits;
  });
  return slot.out;
}

// ldmatrix: lane 8 i + r brings the address of row r (8 elements of 16 bits) of matrix i. Register
// i of lane l gets elements 2 (l % 4) and + 1 of row l / 4; transposed, of column l / 4.
template <int kMatrices>
void load_matrix(uint32_t (&registers)[kMatrices], const void* row, bool transposed, int line) {
  struct Slot {
    const void* row;
    uint32_t* registers;
    Thread* thread;
  } slot{row, registers, block->current};
  const auto combine = [transposed](void** slots) {
    Thread* last = block->current;
    for (int i = 0; i < kMatrices; ++i) {
      uint16_t matrix[8][8];
      for (int r = 0; r < 8; ++r) {
        const auto* source = static_cast<Slot*>(slots[8 * i + r]);
        block->current = source->thread;
        block->read(source->row, matrix[r], 16);
      }
      for (int l = 0; l < 32; ++l) {
        const int a = l / 4, b = 2 * (l % 4);
        const uint32_t low = transposed ? matrix[b][a] : matrix[a][b];
        const uint32_t high = transposed ? matrix[b + 1][a] : matrix[a][b + 1];
        static_cast<Slot*>(slots[l])->registers[i] = low | high << 16;
      }
    }
    block->current = last;
  };
  block->collective(transposed ? "ldmatrix.trans" : "ldmatrix", line, 0xffffffffu, &slot, combine);
}

inline float element(uint32_t pair, int which, const __half*) {
  __half_raw raw;
  raw.x = static_cast<uint16_t>(which == 0 ? pair : pair >> 16);
  return __half2float(__half(raw));
}
inline float element(uint32_t pair, int which, const __nv_bfloat16*) {
  __nv_bfloat16_raw raw;
  raw.x = static_cast<uint16_t>(which == 0 ? pair : pair >> 16);
  return __bfloat162float(__nv_bfloat16(raw));
}

// mma.sync m16n8k16: D += A B with the fragments of the PTX manual. Element pairs lie along k.
//   A register i of lane l: row l / 4 + 8 (i % 2), columns 2 (l % 4) + 8 (i / 2) and + 1
//   B register i of lane l: rows 2 (l % 4) + 8 i and + 1, column l / 4
//   D element i of lane l: row l / 4 + 8 (i / 2), column 2 (l % 4) + i % 2
template <typename E>
void matrix_multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line) {
  struct Slot {
    float* d;
    const uint32_t *a, *b;
  } slot{d, a, b};
  block->collective("mma.sync", line, 0xffffffffu, &slot, [](void** slots) {
    float left[16][16], right[16][8];
    for (int l = 0; l < 32; ++l) {
      const auto* s = static_cast<Slot*>(slots[l]);
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 2; ++j)
          left[l / 4 + 8 * (i % 2)][2 * (l % 4) + 8 * (i / 2) + j] =
              element(s->a[i], j, static_cast<const E*>(nullptr));
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j)
          right[2 * (l % 4) + 8 * i + j][l / 4] =
              element(s->b[i], j, static_cast<const E*>(nullptr));
    }
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + 8 * (i / 2), column = 2 * (l % 4) + i % 2;
        float sum = static_cast<Slot*>(slots[l])->d[i];
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
        static_cast<Slot*>(slots[l])->d[i] = sum;
      }
  });
}

}  // namespace cuda_on_cpu

// ------------------------------------------------------------------ CUDA's own names

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_cpu::block->sync_threads(file, line);
}
inline void __syncwarp(uint32_t mask = 0xffffffffu, int line = __builtin_LINE()) {
  auto& block = *cuda_on_cpu::block;
  auto& warp = block.warps[block.current->index / 32];
  block.collective("__syncwarp", line, mask, nullptr, [&](void**) { ++warp.time; });
}
template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  return cuda_on_cpu::gather(line, mask, value, source, width);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int with, int width = 32, int line = __builtin_LINE()) {
  return cuda_on_cpu::shuffle("__shfl_xor_sync", line, mask, value, [with, width](int i) {
    return (i ^ with) / width == i / width ? i ^ with : i;
  });
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int by, int width = 32, int line = __builtin_LINE()) {
  return cuda_on_cpu::shuffle("__shfl_down_sync", line, mask, value, [by, width](int i) {
    return (i + by) / width == i / width ? i + by : i;
  });
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, int by, int width = 32, int line = __builtin_LINE()) {
  return cuda_on_cpu::shuffle("__shfl_up_sync", line, mask, value,
                              [by, width](int i) { return i % width >= by ? i - by : i; });
}
inline uint32_t __ballot_sync(uint32_t mask, bool predicate, int line = __builtin_LINE()) {
  return cuda_on_cpu::ballot("__ballot_sync", line, mask, predicate);
}
inline bool __any_sync(uint32_t mask, bool predicate, int line = __builtin_LINE()) {
  return cuda_on_cpu::ballot("__any_sync", line, mask, predicate) != 0;
}
inline bool __all_sync(uint32_t mask, bool predicate, int line = __builtin_LINE()) {
  return cuda_on_cpu::ballot("__all_sync", line, mask, predicate) == 0xffffffffu;
}
inline void __threadfence() {}
template <typename T>
T atomicAdd(T* address, T value) {
  cuda_on_cpu::block->check_global(address, sizeof(T), "atomic");
  const T before = *address;
  *address += value;
  return before;
}
