// CUDA's launch model on the CPU, for tests: .cu sources that include launch.cuh compile with `g++ -x c++` and run
// under AddressSanitizer and UBSan, on a machine without a GPU.
//
// Blocks run one after another. The threads of a block are fibers, which run until they meet a barrier or a warp
// operation. Phases between barriers run the warps forwards and backwards in turn, so that a read that lacks its
// barrier finds memory that nobody has written yet (0xff, freshly allocated for each block). Reported, as the
// std::runtime_error of the launch: a thread that ends, or waits elsewhere, while others wait at a barrier or at a warp
// operation; lanes that name different masks; a shuffle from a lane that takes no part. Left to the sanitizers: all
// accesses out of bounds, misaligned vectors, undefined integer arithmetic. Not seen: races within a phase, and
// anything about speed.
#pragma once

#include <sys/mman.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SMPQ_EMULATOR_ASAN(statement) statement
#else
#define SMPQ_EMULATOR_ASAN(statement)
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ \
  static  // one block runs at a time; prefer dynamic shared memory, whose bounds and contents are checked

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_emulator {

// Saves the callee-saved registers and the stack pointer, and continues at another stack. (swapcontext would make a
// system call, and AddressSanitizer's version of it forgets the red zones of the stack that it enters.)
#if !defined(__x86_64__)
#error "cuda_emulator.h switches stacks in x86-64 assembly"
#endif
extern "C" void smpq_emulator_switch(void** save, void* load);
asm(R"(
.weak smpq_emulator_switch
.type smpq_emulator_switch, @function
smpq_emulator_switch:
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
.size smpq_emulator_switch, . - smpq_emulator_switch
)");

struct Place {
  const char* file = "";
  int line = 0;
};

enum class State { ready, at_barrier, at_warp, done };

struct Fiber {
  static constexpr size_t kStack = size_t(1) << 18, kGuard = 4096;
  char* stack = nullptr;  // above an inaccessible page
  void* saved = nullptr;
  void* fake_stack = nullptr;
  State state = State::done;
  Place place;
  const char* what = "";
  unsigned thread = 0;
  // The warp operation that the fiber waits in.
  uint32_t mask = 0;
  bool predicate = false;
  int operation = 0;              // counts the lane's warp operations
  unsigned char slot[2][8] = {};  // what the lane offers, in turn: a lane can be one operation ahead, not two

  Fiber() {
    void* memory = mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kGuard, PROT_NONE);
    stack = static_cast<char*>(memory) + kGuard;
  }
  Fiber(const Fiber&) = delete;
  ~Fiber() {
    SMPQ_EMULATOR_ASAN(__asan_unpoison_memory_region(stack, kStack));
    munmap(stack - kGuard, kStack + kGuard);
  }
};

class Block {
 public:
  Block(unsigned threads, size_t shared_bytes) : threads_(threads), shared_bytes_(shared_bytes) {
    static thread_local std::vector<std::unique_ptr<Fiber>> pool;  // of all launches: stacks are slow to map
    while (pool.size() < threads) pool.push_back(std::make_unique<Fiber>());
    for (unsigned t = 0; t < threads; ++t) fibers_.push_back(pool[t].get());
  }

  void run(const std::function<void()>& kernel) {
    kernel_ = &kernel;
    // On the heap: AddressSanitizer then sees where it ends.
    void* memory = nullptr;
    if (shared_bytes_ && posix_memalign(&memory, 16, shared_bytes_)) throw std::bad_alloc();
    const std::unique_ptr<void, decltype(&free)> owner(memory, &free);
    if (memory) memset(memory, 0xff, shared_bytes_);
    shared_ = memory;
    for (unsigned t = 0; t < threads_; ++t) prepare(*fibers_[t], t);
    const unsigned warps = (threads_ + 31) / 32;
    for (unsigned phase = blockIdx.x;; ++phase) {
      for (unsigned w = 0; w < warps; ++w) run_warp(phase % 2 ? warps - 1 - w : w, phase % 2);
      if (release_barrier()) continue;
      break;
    }
  }

  static thread_local Block* current;
  Fiber& fiber() { return *fibers_[running_]; }
  Fiber& lane(unsigned lane) { return *fibers_[running_ / 32 * 32 + lane]; }
  void* shared(size_t needed) {
    if (needed > 0 && !shared_) complain("no dynamic shared memory was asked for at the launch");
    return shared_;
  }

  // Called by a fiber: waits until the scheduler lets it go on.
  void wait(State state, const char* what, Place place) {
    Fiber& self = fiber();
    self.state = state;
    self.what = what;
    self.place = place;
    leave(self, false);
  }

  // Called by a fiber that found an error; does not return.
  [[noreturn]] void complain(const std::string& error) {
    error_ = error + where(fiber());
    for (;;) wait(State::done, "", {});
  }

 private:
  static std::string where(const Fiber& f) {
    std::string s = " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(f.thread);
    if (f.place.line) s += std::string(", ") + f.what + " at " + f.place.file + ":" + std::to_string(f.place.line);
    return s + ")";
  }

  static void entry() {
    Block& block = *current;
    Fiber& self = block.fiber();
    SMPQ_EMULATOR_ASAN(__sanitizer_finish_switch_fiber(nullptr, &block.main_bottom_, &block.main_size_));
    (*block.kernel_)();
    self.state = State::done;
    self.place = {};
    block.leave(self, true);
    abort();
  }

  void prepare(Fiber& f, unsigned thread) {
    SMPQ_EMULATOR_ASAN(__asan_unpoison_memory_region(f.stack, Fiber::kStack));
    void** top = reinterpret_cast<void**>(f.stack + Fiber::kStack);
    *--top = nullptr;  // entry's return address, which it never uses; the stack is then aligned as after a call
    *--top = reinterpret_cast<void*>(&entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    f.saved = top;
    f.thread = thread;
    f.state = State::ready;
    f.place = {};
    f.fake_stack = nullptr;
    f.operation = 0;
  }

  void leave(Fiber& self, [[maybe_unused]] bool for_good) {
    SMPQ_EMULATOR_ASAN(__sanitizer_start_switch_fiber(for_good ? nullptr : &self.fake_stack, main_bottom_, main_size_));
    smpq_emulator_switch(&self.saved, main_);
    SMPQ_EMULATOR_ASAN(__sanitizer_finish_switch_fiber(self.fake_stack, &main_bottom_, &main_size_));
  }

  void enter(Fiber& f) {
    running_ = f.thread;
    threadIdx = dim3(f.thread % blockDim.x, f.thread / blockDim.x % blockDim.y, f.thread / blockDim.x / blockDim.y);
    SMPQ_EMULATOR_ASAN(__sanitizer_start_switch_fiber(&main_fake_stack_, f.stack, Fiber::kStack));
    smpq_emulator_switch(&main_, f.saved);
    SMPQ_EMULATOR_ASAN(__sanitizer_finish_switch_fiber(main_fake_stack_, nullptr, nullptr));
    if (!error_.empty()) throw std::runtime_error(error_);
  }

  // Until all of its threads have ended or wait at a barrier.
  void run_warp(unsigned warp, bool backwards) {
    const unsigned first = warp * 32, last = first + 32 < threads_ ? first + 32 : threads_;
    for (bool again = true; again;) {
      for (unsigned i = first; i < last; ++i) {
        Fiber& f = *fibers_[backwards ? first + last - 1 - i : i];
        if (f.state == State::ready) enter(f);
      }
      again = false;
      for (unsigned t = first; t < last; ++t) {
        Fiber& f = *fibers_[t];
        if (f.state != State::at_warp) continue;
        release_warp(f, first, last);
        again = true;
      }
    }
  }

  void release_warp(Fiber& f, unsigned first, unsigned last) {
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(f.mask >> lane & 1u)) continue;
      const char* error = nullptr;
      const Fiber* other = first + lane < last ? fibers_[first + lane] : nullptr;
      if (!other || other->state == State::done) {
        error = "warp divergence: a lane of the mask has ended";
      } else if (other->state != State::at_warp) {
        error = "warp divergence: a lane of the mask waits elsewhere";
      } else if (other->mask != f.mask) {
        error = "warp divergence: lanes name different masks";
      } else if (other->place.line != f.place.line || strcmp(other->place.file, f.place.file) != 0) {
        error = "warp divergence: lanes meet in different operations";
      }
      if (error) throw std::runtime_error(error + where(f));
    }
    for (unsigned lane = 0; lane < 32; ++lane)
      if (f.mask >> lane & 1u) fibers_[first + lane]->state = State::ready;
  }

  bool release_barrier() {
    const Fiber* waits = nullptr;
    for (Fiber* f : fibers_)
      if (f->state == State::at_barrier) waits = f;
    if (!waits) return false;
    for (Fiber* f : fibers_) {
      if (f->state == State::done)
        throw std::runtime_error("barrier divergence: thread " + std::to_string(f->thread) + " has ended" +
                                 where(*waits));
      if (f->place.line != waits->place.line || strcmp(f->place.file, waits->place.file) != 0)
        throw std::runtime_error("barrier divergence:" + where(*f) + where(*waits));
    }
    for (Fiber* f : fibers_) f->state = State::ready;
    return true;
  }

  const unsigned threads_;
  const size_t shared_bytes_;
  const std::function<void()>* kernel_ = nullptr;
  void* shared_ = nullptr;
  std::vector<Fiber*> fibers_;
  unsigned running_ = 0;
  std::string error_;
  void* main_ = nullptr;
  [[maybe_unused]] void* main_fake_stack_ = nullptr;
  [[maybe_unused]] const void* main_bottom_ = nullptr;
  [[maybe_unused]] size_t main_size_ = 0;
};

inline thread_local Block* Block::current = nullptr;

inline void* dynamic_shared(size_t needed) { return Block::current->shared(needed); }

// Offers `value` to the warp, meets the lanes of the mask, and returns what `source` offers.
template <class T>
T exchange(uint32_t mask, T value, unsigned source, const char* what, Place place) {
  static_assert(sizeof(T) <= 8);
  Block& block = *Block::current;
  Fiber& self = block.fiber();
  const unsigned lane = self.thread % 32;
  self.place = place;
  self.what = what;
  if (!(mask >> lane & 1u)) block.complain("the mask of a warp operation lacks its own lane");
  if (!(mask >> source & 1u)) block.complain("shuffle from a lane that is not in the mask");
  const int turn = self.operation++ % 2;
  memcpy(self.slot[turn], &value, sizeof(T));
  self.mask = mask;
  block.wait(State::at_warp, what, place);
  T result;
  memcpy(&result, block.lane(source).slot[turn], sizeof(T));
  return result;
}

inline unsigned lane_id() { return Block::current->fiber().thread % 32; }

}  // namespace cuda_emulator

#define SMPQ_EMULATOR_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SMPQ_EMULATOR_PLACE) {
  cuda_emulator::Block::current->wait(cuda_emulator::State::at_barrier, "__syncthreads", {file, line});
}
inline void __syncwarp(uint32_t mask = 0xffffffffu, SMPQ_EMULATOR_PLACE) {
  cuda_emulator::exchange(mask, 0, cuda_emulator::lane_id(), "__syncwarp", {file, line});
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, SMPQ_EMULATOR_PLACE) {
  const unsigned lane = cuda_emulator::lane_id(), from = lane / width * width + static_cast<unsigned>(source) % width;
  return cuda_emulator::exchange(mask, value, from, "__shfl_sync", {file, line});
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, SMPQ_EMULATOR_PLACE) {
  const unsigned lane = cuda_emulator::lane_id();
  const unsigned from = lane % width + delta < static_cast<unsigned>(width) ? lane + delta : lane;
  return cuda_emulator::exchange(mask, value, from, "__shfl_down_sync", {file, line});
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, SMPQ_EMULATOR_PLACE) {
  const unsigned lane = cuda_emulator::lane_id();
  return cuda_emulator::exchange(mask, value, lane % width >= delta ? lane - delta : lane, "__shfl_up_sync",
                                 {file, line});
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32, SMPQ_EMULATOR_PLACE) {
  const unsigned lane = cuda_emulator::lane_id(), from = lane ^ static_cast<unsigned>(lanes);
  return cuda_emulator::exchange(mask, value, from / width == lane / width ? from : lane, "__shfl_xor_sync",
                                 {file, line});
}
inline uint32_t __ballot_sync(uint32_t mask, bool predicate, SMPQ_EMULATOR_PLACE) {
  cuda_emulator::Block& block = *cuda_emulator::Block::current;
  cuda_emulator::Fiber& self = block.fiber();
  const int turn = self.operation % 2;
  cuda_emulator::exchange(mask, static_cast<uint32_t>(predicate), self.thread % 32, "__ballot_sync", {file, line});
  uint32_t votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1u) votes |= static_cast<uint32_t>(block.lane(lane).slot[turn][0]) << lane;
  return votes;
}
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
// Threads take turns only at barriers and warp operations: nothing can come in between.
template <class T>
T atomicAdd(T* p, T v) {
  const T old = *p;
  *p = old + v;
  return old;
}

template <class T>
T atomicExch(T* p, T v) {
  const T old = *p;
  *p = v;
  return old;
}

namespace cuda_emulator {

// mma.sync.aligned of 16 rows, 8 columns and 8 words, its fragments as in the PTX ISA, "Matrix Fragments for
// mma.m16n8k32" and those for ".tf32" of mma.m16n8k8, which are the same. add(sum, x, w): two words.
template <class Sum, class Add>
void mma(Sum (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Add add, const char* file, int line) {
  constexpr uint32_t everyone = 0xffffffffu;
  const int lane = static_cast<int>(lane_id()), row = lane / 4, column = lane % 4 * 2;
  for (int j = 0; j < 4; ++j) {  // the lane that holds words j and j + 4
    uint32_t x[4], w[2][2];
    for (int k = 0; k < 4; ++k) x[k] = __shfl_sync(everyone, a[k], row * 4 + j, 32, file, line);
    for (int n = 0; n < 2; ++n) {
      for (int k = 0; k < 2; ++k) w[n][k] = __shfl_sync(everyone, b[k], (column + n) * 4 + j, 32, file, line);
    }
    for (int half = 0; half < 2; ++half) {       // words j and j + 4
      for (int lower = 0; lower < 2; ++lower) {  // rows `row` and `row + 8`
        for (int n = 0; n < 2; ++n) add(sum[lower * 2 + n], x[half * 2 + lower], w[n][half]);
      }
    }
  }
}

// Four products of bytes of type A and B; sums wrap.
template <class A, class B>
void mma_m16n8k32(int32_t (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SMPQ_EMULATOR_PLACE) {
  const auto add = [](int32_t& to, uint32_t x, uint32_t w) {
    for (int byte = 0; byte < 4; ++byte) {
      const int product = static_cast<A>(x >> (8 * byte)) * static_cast<B>(w >> (8 * byte));
      to = static_cast<int32_t>(static_cast<uint32_t>(to) + static_cast<uint32_t>(product));
    }
  };
  mma(sum, a, b, add, file, line);
}

// Products of floats whose last 13 bits the hardware does not see; what is added is cut off, not rounded.
inline void mma_m16n8k8_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SMPQ_EMULATOR_PLACE) {
  const auto seen = [](uint32_t word) {
    float value;
    word &= 0xffffe000u;
    memcpy(&value, &word, 4);
    return value;
  };
  const auto add = [&](float& to, uint32_t x, uint32_t w) {
    const double exact = to + static_cast<double>(seen(x)) * seen(w);
    to = static_cast<float>(exact);
    if (std::abs(static_cast<double>(to)) > std::abs(exact)) to = std::nextafter(to, 0.0f);
  };
  mma(sum, a, b, add, file, line);
}

}  // namespace cuda_emulator

// The part of the runtime that launches need.
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxThreadsPerMultiProcessor
};
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchAttribute {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaSuccess             ? "no error"
         : e == cudaErrorInvalidValue ? "invalid argument"
                                      : "invalid configuration argument";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// A small device: kernels that stride over the grid then do so in tests.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMaxThreadsPerBlock ? 1024 : attribute == cudaDevAttrMultiProcessorCount ? 2 : 512;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || !threads ||
      threads > 1024 || config->dynamicSmemBytes > 48 * 1024)
    return cudaErrorInvalidConfiguration;
  static std::mutex one_at_a_time;  // static __shared__ memory exists once
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  cuda_emulator::Block emulated(static_cast<unsigned>(threads), config->dynamicSmemBytes);
  const std::function<void()> body = [&] { kernel(arguments...); };
  struct Current {
    explicit Current(cuda_emulator::Block* b) { cuda_emulator::Block::current = b; }
    ~Current() { cuda_emulator::Block::current = nullptr; }
  } const current(&emulated);
  gridDim = grid;
  blockDim = block;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        emulated.run(body);
      }
  return cudaSuccess;
}
