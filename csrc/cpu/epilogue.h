// What becomes of 16 channels of a pixel, for all kernels that end in an Epilogue. Everything has internal linkage.
#pragma once

#include <cstring>
#include <type_traits>

#include "vectors.h"

namespace smpq::cpu::SMPQ_ISA {
namespace {

// The first n lanes, most often all of them; the others are left, or become 0 where they are loaded.
template <bool whole>
SMPQ_INLINE void load_lanes(Floats& v, const float* from, [[maybe_unused]] int n) {
  if constexpr (whole) {
    std::memcpy(&v, from, sizeof v);
  } else {
#if defined(__AVX512F__)
    reinterpret_cast<__m512&>(v) = _mm512_maskz_loadu_ps((1u << n) - 1, from);
#else
    v = Floats{};
    for (int k = 0; k < n; ++k) v[k] = from[k];
#endif
  }
}
template <bool whole>
SMPQ_INLINE void store_lanes(float* to, const Floats& v, [[maybe_unused]] int n) {
  if constexpr (whole) {
    std::memcpy(to, &v, sizeof v);
  } else {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(to, (1u << n) - 1, reinterpret_cast<const __m512&>(v));
#else
    for (int k = 0; k < n; ++k) to[k] = v[k];
#endif
  }
}

// No less than `low`, no more than `high`; NaN stays.
SMPQ_INLINE void clamp(Floats& y, float low, float high) {
#if defined(__AVX512F__)  // the instructions give their second operand where one is NaN
  auto& v = reinterpret_cast<__m512&>(y);
  v = _mm512_maskz_min_ps(0xffff, _mm512_set1_ps(high), _mm512_maskz_max_ps(0xffff, _mm512_set1_ps(low), v));
#else
  limit(y, low, high);
#endif
}

// The same, NaN becoming `low`, rounded half to even: within 2^22.
SMPQ_INLINE void whole_steps(Ints& whole, const Floats& steps, float low, float high) {
#if defined(__AVX512F__)
  const __m512 above = _mm512_maskz_max_ps(0xffff, reinterpret_cast<const __m512&>(steps), _mm512_set1_ps(low));
  const __m512 inside = _mm512_maskz_min_ps(0xffff, above, _mm512_set1_ps(high));
  reinterpret_cast<__m512i&>(whole) = _mm512_maskz_cvtps_epi32(0xffff, inside);
#else
  Floats inside = steps >= low ? steps : Floats{} + low;
  inside = inside <= high ? inside : Floats{} + high;
  whole = __builtin_convertvector((inside + kRound) - kRound, Ints);
#endif
}

SMPQ_INLINE void quantize(Bytes& codes, const Floats& y, const Child& child) {
  Ints whole;
  whole_steps(whole, y * child.inv_scale, child.low, child.high);
  whole += static_cast<int32_t>(child.zero_point);
#if defined(__AVX512F__)
  // One instruction, of which the compiler makes several; the form without a mask warns in gcc 12.
  const __m128i narrow = _mm512_maskz_cvtepi32_epi8(0xffff, reinterpret_cast<const __m512i&>(whole));
  std::memcpy(&codes, &narrow, sizeof codes);
#else
  codes = __builtin_convertvector(whole, Bytes);
#endif
}

// A mixture of widths, added in the order of its candidates.
SMPQ_INLINE void mix(Floats& mixed, const Floats& y, const Child& child) {
  mixed = Floats{};
  for (int64_t k = 0; k < child.count; ++k) {
    const Candidate& c = child.candidates[k];
    Floats steps = y * c.inv_scale;
    clamp(steps, c.low, c.high);
    steps = (steps + kRound) - kRound;  // as in whole_steps
    const Floats term = steps * c.scale * c.share;
    mixed = k ? mixed + term : term;
  }
}

// A mixture as whole numbers, within 16 bits.
SMPQ_INLINE void fix(Shorts& fixed, const Floats& y, const Child& child) {
  Floats mixed;
  mix(mixed, y, child);
  Ints whole;
  whole_steps(whole, mixed, -32767.0f, 32767.0f);
#if defined(__AVX512F__)
  const __m256i narrow = _mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<const __m512i&>(whole));
  std::memcpy(&fixed, &narrow, sizeof fixed);
#else
  fixed = __builtin_convertvector(whole, Shorts);
#endif
}

// Codes or whole numbers of n channels, those up to the next multiple of four being 0.
template <bool whole, class V>
SMPQ_INLINE void store_whole(void* to, V& v, [[maybe_unused]] int n) {
  if constexpr (whole) {
    std::memcpy(to, &v, sizeof v);
  } else {
    using Item = std::remove_reference_t<decltype(v[0])>;
    v &= V{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} < static_cast<Item>(n);
    const int quads = (n + 3) / 4;
    for (int k = 0; k < quads; ++k) {
      std::memcpy(static_cast<Item*>(to) + 4 * k, reinterpret_cast<const char*>(&v) + 4 * k * sizeof(Item),
                  4 * sizeof(Item));
    }
  }
}

template <Activation activation>
void activate_all(Floats* y, int count) {
#pragma GCC unroll 2
  for (int t = 0; t < count; ++t) activate<activation>(y[t]);
}

__attribute__((noinline)) void activate_all(Floats* y, int count, Activation activation) {
  switch (activation) {
    case Activation::gelu:
      return activate_all<Activation::gelu>(y, count);
    case Activation::gelu_tanh:
      return activate_all<Activation::gelu_tanh>(y, count);
    case Activation::silu:
      return activate_all<Activation::silu>(y, count);
    case Activation::hardswish:
      return activate_all<Activation::hardswish>(y, count);
    case Activation::none:
      return;
  }
}

// plain: no factor, no activation.
template <int T, bool whole, bool plain>
SMPQ_INLINE void finish_as(const Epilogue& e, int64_t row, int64_t pixel, int64_t channel, Floats (&y)[T], int n) {
  const int64_t channels = e.channels, code_channels = e.code_channels;
  if (e.residual) {
    const float* from = e.residual + (e.residual_row[row] * e.pixels + pixel) * channels + channel;
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      Floats other;
      load_lanes<whole>(other, from + t * channels, n);
      y[t] = !plain && e.multiplies ? y[t] * other : y[t] + other;
    }
  }
  const float low = e.low, high = e.high;
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) clamp(y[t], low, high);
  if constexpr (!plain) activate_all(y, T, e.activation);
  if (e.values) {
    float* to = e.values + (row * e.pixels + pixel) * channels + channel;
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) store_lanes<whole>(to + t * channels, y[t], n);
  }
  const int64_t last = e.child_begin[row + 1];
  for (int64_t c = e.child_begin[row]; c < last; ++c) {
    const Child child = e.children[c];
    if (child.codes) {
      uint8_t* to = child.codes + pixel * code_channels + channel;
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        Bytes codes;
        quantize(codes, y[t], child);
        store_whole<whole>(to + t * code_channels, codes, n);
      }
    } else if (child.fixed) {
      int16_t* to = child.fixed + pixel * code_channels + channel;
      for (int t = 0; t < T; ++t) {
        Shorts fixed;
        fix(fixed, y[t], child);
        store_whole<whole>(to + t * code_channels, fixed, n);
      }
    } else {
      float* to = child.mixed + pixel * channels + channel;
      for (int t = 0; t < T; ++t) {
        Floats mixed;
        mix(mixed, y[t], child);
        store_lanes<whole>(to + t * channels, mixed, n);
      }
    }
  }
}

template <int T, bool whole>
__attribute__((noinline)) void finish_not_plain(const Epilogue& e, int64_t row, int64_t pixel, int64_t channel,
                                                Floats (&y)[T], int n) {
  finish_as<T, whole, false>(e, row, pixel, channel, y, n);
}

template <int T, bool whole>
SMPQ_INLINE void finish_lanes(const Epilogue& e, int64_t row, int64_t pixel, int64_t channel, Floats (&y)[T], int n) {
  if (e.activation == Activation::none && !e.multiplies) {
    return finish_as<T, whole, true>(e, row, pixel, channel, y, n);
  }
  Floats own[T];  // so that y stays in registers on the way that is taken most
  std::memcpy(own, y, sizeof y);
  finish_not_plain<T, whole>(e, row, pixel, channel, own, n);
}

// Sums and sums of squares of 16 channels, exact up to 2^53.
struct Moments {
  Doubles sum[2], square[2];

  template <class V>
  SMPQ_INLINE void add(const V& values) {
    const auto low = __builtin_shufflevector(values, values, 0, 1, 2, 3, 4, 5, 6, 7);
    const auto high = __builtin_shufflevector(values, values, 8, 9, 10, 11, 12, 13, 14, 15);
    add_half(0, __builtin_convertvector(low, Doubles));
    add_half(1, __builtin_convertvector(high, Doubles));
  }
  SMPQ_INLINE void add_half(int half, const Doubles& exact) {
    sum[half] += exact;
    square[half] += exact * exact;
  }
  SMPQ_INLINE void store(double* sums, double* squares, int n) const {
    std::memcpy(sums, sum, n * sizeof(double));
    std::memcpy(squares, square, n * sizeof(double));
  }
};

// Up to 16 channels, from `channel` on, of T pixels, from `pixel` on. What it takes of the arguments is read once for
// all of them: a code that is stored could, for all that the compiler knows, change any argument.
template <int T>
SMPQ_INLINE void finish(const Epilogue& e, int64_t row, int64_t pixel, int64_t channel, Floats (&y)[T]) {
  const int64_t n = e.channels - channel;
  n >= kLanes ? finish_lanes<T, true>(e, row, pixel, channel, y, kLanes)
              : finish_lanes<T, false>(e, row, pixel, channel, y, static_cast<int>(n));
}

}  // namespace
}  // namespace smpq::cpu::SMPQ_ISA
