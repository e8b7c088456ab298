// Vectors of 16 lanes, which gcc maps to what the instruction set has. Everything has internal linkage.
#pragma once

#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../kernels.h"

#define SMPQ_INLINE inline __attribute__((always_inline))

namespace smpq::cpu::SMPQ_ISA {
namespace {

constexpr int kLanes = 16;  // output channels that are computed together
using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));
using Doubles = double __attribute__((vector_size(kLanes / 2 * sizeof(double))));
using Ints = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));
using Shorts = int16_t __attribute__((vector_size(kLanes * sizeof(int16_t))));
using Bytes = uint8_t __attribute__((vector_size(kLanes)));

template <class V>
SMPQ_INLINE void load(V& v, const void* from) {  // no vector is returned: its ABI differs between instruction sets
  std::memcpy(&v, from, sizeof v);
}

// Whether any lane is not 0.
SMPQ_INLINE bool any(const Ints& lanes) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<const __m512i&>(lanes), reinterpret_cast<const __m512i&>(lanes));
#else
  int32_t found = 0;
  for (int k = 0; k < kLanes; ++k) found |= lanes[k];
  return found;
#endif
}

// rint of what is within 2^22: adding and taking away 1.5 * 2^23 leaves an integer, half to even.
constexpr float kRound = 12582912.0f;

}  // namespace
}  // namespace smpq::cpu::SMPQ_ISA
