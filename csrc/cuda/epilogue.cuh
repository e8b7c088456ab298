// What becomes of two channels of a pixel, for all kernels that end in an Epilogue.
#pragma once

#include "launch.cuh"

namespace smpq {
namespace cuda {

__device__ __forceinline__ uint8_t code_of(float y, const Child& child) {
  float steps = y * child.inv_scale;
  steps = steps >= child.low ? steps : child.low;  // also NaN
  steps = steps <= child.high ? steps : child.high;
  return static_cast<uint8_t>(static_cast<int>(std::rint(steps) + child.zero_point));
}

__device__ __forceinline__ float activated(float y, Activation activation) {
  switch (activation) {
    case Activation::gelu:
      activate<Activation::gelu>(y);
      break;
    case Activation::gelu_tanh:
      activate<Activation::gelu_tanh>(y);
      break;
    case Activation::silu:
      activate<Activation::silu>(y);
      break;
    case Activation::hardswish:
      activate<Activation::hardswish>(y);
      break;
    case Activation::none:
      break;
  }
  return y;
}

// A mixture of widths, added in the order of its candidates.
__device__ __forceinline__ float mixed(float y, const Child& child) {
  float total = 0;
  for (int64_t k = 0; k < child.count; ++k) {
    const Candidate& c = child.candidates[k];
    float steps = y * c.inv_scale;
    limit(steps, c.low, c.high);
    const float term = (std::rint(steps) + 0.0f) * c.scale * c.share;
    total = k ? total + term : term;
  }
  return total;
}

__device__ __forceinline__ int16_t fixed_of(float y, const Child& child) {
  float whole = mixed(y, child);
  whole = whole >= -32767.0f ? whole : -32767.0f;  // also NaN
  whole = whole <= 32767.0f ? whole : 32767.0f;
  return static_cast<int16_t>(static_cast<int>(std::rint(whole)));
}

// Channels `channel` (even) and the next, as far as they are there; codes have more, which are 0.
__device__ __forceinline__ void finish(const Epilogue& e, int64_t row, int64_t pixel, int64_t channel, float first,
                                       float second) {
  float y[2] = {first, second};
  const int there = static_cast<int>(e.channels - channel < 2 ? (e.channels > channel ? 1 : 0) : 2);
  const int64_t at = pixel * e.channels + channel, size = e.pixels * e.channels;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (k >= there) continue;
    if (e.residual) {
      const float other = e.residual[e.residual_row[row] * size + at + k];
      y[k] = e.multiplies ? y[k] * other : y[k] + other;
    }
    limit(y[k], e.low, e.high);
    y[k] = activated(y[k], e.activation);
    if (e.values) e.values[row * size + at + k] = y[k];
  }
  if (channel >= e.code_channels) return;
  for (int64_t c = e.child_begin[row]; c >= 0;) {
    const Child child = e.children[c];
    if (child.codes) {
      Pack<uint8_t, 2> codes{};
      for (int k = 0; k < there; ++k) codes.item[k] = code_of(y[k], child);
      store_pack(child.codes + pixel * e.code_channels + channel, codes, 2);
    } else if (child.fixed) {
      Pack<int16_t, 2> whole{};
      for (int k = 0; k < there; ++k) whole.item[k] = fixed_of(y[k], child);
      store_pack(child.fixed + pixel * e.code_channels + channel, whole, 2);
    } else {
      for (int k = 0; k < there; ++k) child.mixed[at + k] = mixed(y[k], child);
    }
    c = child.next;
  }
}

inline int64_t blocks_for(int64_t threads) { return (threads + kThreads - 1) / kThreads; }

__device__ __forceinline__ int64_t thread_id() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }

}  // namespace cuda
}  // namespace smpq
