// What becomes of 16 channels of a pixel, for all kernels that end in an Epilogue. Everything has internal linkage.
#pragma once

#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../kernels.h"

namespace smpq::cpu::SMPQ_ISA {
namespace {

constexpr int kLanes = 16;  // output channels that are computed together
using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));
using Doubles = double __attribute__((vector_size(kLanes * sizeof(double))));
using Ints = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));
using Shorts = int16_t __attribute__((vector_size(kLanes * sizeof(int16_t))));
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
  const Ints whole = __builtin_convertvector(steps, Ints);
#if defined(__AVX512F__)
  // One instruction, of which the compiler makes several; the form without a mask warns in gcc 12.
  const __m128i narrow = _mm512_maskz_cvtepi32_epi8(0xffff, reinterpret_cast<const __m512i&>(whole));
  std::memcpy(&codes, &narrow, sizeof codes);
#else
  codes = __builtin_convertvector(whole, Bytes);
#endif
}

// A mixture of widths, added in the order of its candidates.
inline void mix(Floats& mixed, const Floats& y, const Child& child) {
  mixed = Floats{};
  for (int64_t k = 0; k < child.count; ++k) {
    const Candidate& c = child.candidates[k];
    Floats steps = y * c.inv_scale;
    steps = steps < c.low ? Floats{} + c.low : steps;  // NaN stays
    steps = steps > c.high ? Floats{} + c.high : steps;
    const Floats term = ((steps + 12582912.0f) - 12582912.0f) * c.scale * c.share;
    mixed = k ? mixed + term : term;
  }
}

// A mixture as whole numbers, within 16 bits.
inline void fix(Shorts& fixed, const Floats& y, const Child& child) {
  Floats mixed;
  mix(mixed, y, child);
  mixed = mixed >= -32767.0f ? mixed : Floats{} - 32767.0f;  // also NaN
  mixed = mixed <= 32767.0f ? mixed : Floats{} + 32767.0f;
  const Ints whole = __builtin_convertvector((mixed + 12582912.0f) - 12582912.0f, Ints);
#if defined(__AVX512F__)
  const __m256i narrow = _mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<const __m512i&>(whole));
  std::memcpy(&fixed, &narrow, sizeof fixed);
#else
  fixed = __builtin_convertvector(whole, Shorts);
#endif
}

// The floats of `n` channels, most often all of 4 * quads: a copy of a size that the compiler knows is no call.
template <int quads>
inline __attribute__((always_inline)) void copy_channels(void* to, const void* from, int n) {
  std::memcpy(to, from, n == 4 * quads ? 4 * quads * sizeof(float) : n * sizeof(float));
}

template <int quads>
inline __attribute__((always_inline)) void finish_quads(const Epilogue& e, int64_t row, int64_t pixel, int64_t channel,
                                                        const Floats& product, int n) {
  Floats y = product;
  if (e.residual) {
    Floats other{};
    copy_channels<quads>(&other, e.residual + (e.residual_row[row] * e.pixels + pixel) * e.channels + channel, n);
    y += other;
  }
  clamp(y, e);
  if (e.values) copy_channels<quads>(e.values + (row * e.pixels + pixel) * e.channels + channel, &y, n);
  for (int64_t c = e.child_begin[row]; c < e.child_begin[row + 1]; ++c) {
    const Child& child = e.children[c];
    if (child.codes) {
      Bytes codes;
      quantize(codes, y, child);
      if (n < kLanes) codes &= Bytes{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} < static_cast<uint8_t>(n);
      std::memcpy(child.codes + pixel * e.code_channels + channel, &codes, 4 * quads);
    } else if (child.fixed) {
      Shorts fixed;
      fix(fixed, y, child);
      if (n < kLanes) fixed &= Shorts{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} < static_cast<int16_t>(n);
      std::memcpy(child.fixed + pixel * e.code_channels + channel, &fixed, 4 * quads * sizeof(int16_t));
    } else {
      Floats mixed;
      mix(mixed, y, child);
      copy_channels<quads>(child.mixed + pixel * e.channels + channel, &mixed, n);
    }
  }
}

// Up to 16 channels of one pixel, from `channel` on.
inline __attribute__((always_inline)) void finish(const Epilogue& e, int64_t row, int64_t pixel, int64_t channel,
                                                  const Floats& product) {
  const int n = static_cast<int>(e.channels - channel);
  if (n >= kLanes) return finish_quads<4>(e, row, pixel, channel, product, kLanes);
  switch ((n + 3) / 4) {
    case 1:
      return finish_quads<1>(e, row, pixel, channel, product, n);
    case 2:
      return finish_quads<2>(e, row, pixel, channel, product, n);
    case 3:
      return finish_quads<3>(e, row, pixel, channel, product, n);
    default:
      return finish_quads<4>(e, row, pixel, channel, product, n);
  }
}

}  // namespace
}  // namespace smpq::cpu::SMPQ_ISA
