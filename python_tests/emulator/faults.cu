// Kernels with one fault each, by name: test_emulated.py wants every one of them reported, and the two sound ones not.
#include <cstdio>
#include <cstring>
#include <map>
#include <vector>

#include "../../csrc/cuda/launch.cuh"

namespace {

using smpq::cuda::block_shared;
using smpq::cuda::kThreads;
using smpq::cuda::Pack;

struct Buffer {
  float item[kThreads];
};

__global__ void reverse(const float* x, float* y) {
  float* item = block_shared<Buffer>().item;
  item[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = item[kThreads - 1 - threadIdx.x];
}
__global__ void missing_barrier(const float* x, float* y) {
  float* item = block_shared<Buffer>().item;
  item[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = item[kThreads - 1 - threadIdx.x];
}
__global__ void rotate_in_warp(const float* x, float* y) {
  const float next = __shfl_sync(0xffffffffu, x[threadIdx.x], (threadIdx.x + 1) % 32);
  y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, next, 1) + __popc(__ballot_sync(0xffffffffu, threadIdx.x % 2)) - 16;
}
__global__ void write_out_of_bounds(const float* x, float* y) { y[threadIdx.x + 1] = x[threadIdx.x]; }
__global__ void read_out_of_bounds(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x + 1]; }
__global__ void shared_out_of_bounds(const float* x, float* y) {
  float* item = block_shared<Buffer>().item;
  item[threadIdx.x + 1] = x[threadIdx.x];
  y[threadIdx.x] = 0;
}
__global__ void stack_out_of_bounds(const float* x, float* y) {
  volatile float item[4] = {x[0], x[1], x[2], x[3]};
  volatile float* p = item;
  __syncthreads();
  y[threadIdx.x] = p[threadIdx.x / 32];
}
__global__ void misaligned_vector(const float* x, float* y) {
  *reinterpret_cast<Pack<float, 4>*>(y + threadIdx.x / 2) = *reinterpret_cast<const Pack<float, 4>*>(x);
}
__global__ void signed_overflow(const float* x, float* y) {
  const int big = static_cast<int>(x[threadIdx.x]) + 0x7fffffff;
  y[threadIdx.x] = static_cast<float>(big);
}
__global__ void shift_too_far(const float* x, float* y) {
  y[threadIdx.x] = static_cast<float>(1 << static_cast<int>(x[threadIdx.x]));
}
__global__ void float_to_int_overflow(const float* x, float* y) {
  y[threadIdx.x] = static_cast<int>(x[threadIdx.x] * 1e20f);
}
__global__ void exit_before_barrier(const float* x, float* y) {
  if (threadIdx.x == 77) return;
  __syncthreads();
  y[threadIdx.x] = x[threadIdx.x];
}
__global__ void different_barriers(const float* x, float* y) {
  if (threadIdx.x < 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = x[threadIdx.x];
}
__global__ void exit_before_shuffle(const float* x, float* y) {
  if (threadIdx.x % 32 == 5) return;
  y[threadIdx.x] = __shfl_down_sync(0xffffffffu, x[threadIdx.x], 1);
}
__global__ void shuffle_against_barrier(const float* x, float* y) {
  if (threadIdx.x == 3) __syncthreads();
  y[threadIdx.x] = __shfl_down_sync(0xffffffffu, x[threadIdx.x], 1);
}
__global__ void different_masks(const float* x, float* y) {
  y[threadIdx.x] = __shfl_down_sync(threadIdx.x % 32 < 4 ? 0xffffu : 0xffffffffu, x[threadIdx.x], 1);
}
__global__ void source_outside_mask(const float* x, float* y) {
  if (threadIdx.x % 32 < 16) y[threadIdx.x] = __shfl_sync(0xffffu, x[threadIdx.x], 20);
}

}  // namespace

int main(int, char** argv) {
  using Kernel = void (*)(const float*, float*);
#define KERNEL(name) \
  {                  \
    #name, name      \
  }
  const std::map<std::string, Kernel> kernels{KERNEL(reverse),
                                              KERNEL(missing_barrier),
                                              KERNEL(rotate_in_warp),
                                              KERNEL(write_out_of_bounds),
                                              KERNEL(read_out_of_bounds),
                                              KERNEL(shared_out_of_bounds),
                                              KERNEL(stack_out_of_bounds),
                                              KERNEL(misaligned_vector),
                                              KERNEL(signed_overflow),
                                              KERNEL(shift_too_far),
                                              KERNEL(float_to_int_overflow),
                                              KERNEL(exit_before_barrier),
                                              KERNEL(different_barriers),
                                              KERNEL(exit_before_shuffle),
                                              KERNEL(shuffle_against_barrier),
                                              KERNEL(different_masks),
                                              KERNEL(source_outside_mask)};
  const std::string name = argv[1];
  std::vector<float> x(kThreads), y(kThreads, -1);
  for (int i = 0; i < kThreads; ++i) x[i] = static_cast<float>(i);
  try {
    const bool too_much = name == "too_much_shared_memory";
    smpq::cuda::launch("faults", too_much ? reverse : kernels.at(name), 2, too_much ? 100000 : sizeof(Buffer), nullptr,
                       static_cast<const float*>(x.data()), y.data());
  } catch (const std::runtime_error& error) {
    fprintf(stderr, "launch failed: %s\n", error.what());
    return 1;
  }
  for (int i = 0; i < kThreads; ++i) {
    const int expected = name == "rotate_in_warp" ? i / 32 * 32 + ((i ^ 1) + 1) % 32 : kThreads - 1 - i;
    if (y[i] != static_cast<float>(expected)) {
      fprintf(stderr, "wrong result: y[%d] is %g, not %d\n", i, y[i], expected);
      return 1;
    }
  }
  puts("right result");
}
