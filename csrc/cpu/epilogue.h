// What becomes of 16 channels of a pixel, for all kernels that end in an Epilogue. Everything has internal linkage.
#pragma once

#include <cstring>

#include "../kernels.h"

namespace smpq::cpu::SMPQ_ISA {
namespace {

constexpr int kLanes = 16;  // output channels that are computed together
using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));
using Doubles = double __attribute__((vector_size(kLanes * sizeof(double))));
using Ints = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));
using Bytes = uint8_t __attribute__((vector_size(kLanes)));

template <class V>
inline void load(V& v, const void* from) {  // no vector is returned: its ABI differs between instruction sets
  std::memcpy(&v, from, sizeof v);
}

inline void clamp(Floats& y, const Epilogue& e) {
  y = y < e.low ? Floats{} + e.low : y;  // NaN stays
  y = y > e.high ? Floats{} + e.high : y;
}

inline void quantize(Bytes& codes, const Floats& y, const Child& child) {
  Floats steps = y * child.inv_scale;
  steps = steps >= child.low ? steps : Floats{} + child.low;
  steps = steps <= child.high ? steps : Floats{} + child.high;
  // rint: adding and taking away 1.5 * 2^23 leaves an integer, half to even.
  steps = (steps + 12582912.0f) - 12582912.0f + child.zero_point;
  codes = __builtin_convertvector(__builtin_convertvector(steps, Ints), Bytes);
}

// 16 channels of one pixel; unless `whole`, `n` of them are there, `n_codes` in the codes.
template <bool whole>
inline __attribute__((always_inline)) void finish(const Epilogue& e, int64_t row, int64_t pixel, int64_t channel,
                                                  const Floats& product, int n, int n_codes) {
  const size_t bytes = whole ? sizeof(Floats) : n * sizeof(float);
  Floats y = product;
  if (e.residual) {
    Floats other{};
    std::memcpy(&other, e.residual + (e.residual_row[row] * e.pixels + pixel) * e.channels + channel, bytes);
    y += other;
  }
  clamp(y, e);
  if (e.values) std::memcpy(e.values + (row * e.pixels + pixel) * e.channels + channel, &y, bytes);
  for (int64_t c = e.child_begin[row]; c < e.child_begin[row + 1]; ++c) {
    const Child& child = e.children[c];
    Bytes codes;
    quantize(codes, y, child);
    if constexpr (!whole) {
      for (int k = n; k < kLanes; ++k) codes[k] = 0;
    }
    std::memcpy(child.codes + pixel * e.code_channels + channel, &codes, whole ? sizeof(Bytes) : n_codes);
  }
}

}  // namespace
}  // namespace smpq::cpu::SMPQ_ISA
