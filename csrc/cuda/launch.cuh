// What every kernel of this folder shares: a checked launch, wide accesses, the grid of a channel, shared memory.
// No torch here, so that the CUDA half builds beside a CPU-only torch, and runs in python_tests/emulator without nvcc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../kernels.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "cuda_emulator.h"
#endif

namespace smpq {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // else the next caller, torch for one, finds the error that is reported here
  throw std::runtime_error(std::string("smpq::cuda::") + what + ": " + cudaGetErrorString(status));
}

inline int64_t device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int64_t shared_bytes, void* stream,
            const Arguments&... arguments) {
  if (blocks <= 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error(std::string("smpq::cuda::") + name + ": too many blocks");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

// The dynamic shared memory of the block.
template <class T>
__device__ __forceinline__ T& block_shared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char memory[];
  return *reinterpret_cast<T*>(memory);
#else
  return *static_cast<T*>(cuda_emulator::dynamic_shared(sizeof(T)));
#endif
}

// N elements that move in one access.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T item[N];
};
template <class T>
constexpr int kLanes = static_cast<int>(16 / sizeof(T));

inline bool aligned(const void* pointer, size_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// The first `available` of N elements; the rest is zero.
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* from, int64_t available) {
  if (available >= N) return *reinterpret_cast<const Pack<T, N>*>(from);
  Pack<T, N> pack{};
#pragma unroll
  for (int k = 0; k < N; ++k)
    if (k < available) pack.item[k] = from[k];
  return pack;
}

template <int N, class T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, N>& pack, int64_t available) {
  if (available >= N) {
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
    return;
  }
#pragma unroll
  for (int k = 0; k < N; ++k)
    if (k < available) to[k] = pack.item[k];
}

template <class C, class Z>
__device__ __forceinline__ Grid<C> grid_at(const C* scale, const Z* zero_point, int64_t index, int32_t quant_min,
                                           int32_t quant_max) {
  Grid<C> grid =
      make_grid<C>(scale[index], zero_point ? static_cast<C>(zero_point[index]) : C(0), quant_min, quant_max);
  if constexpr (std::is_integral<Z>::value)
    grid.exact = true;  // it is; saying so takes the other branch out of the code
  return grid;
}

}  // namespace cuda
}  // namespace smpq
