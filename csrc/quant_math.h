// The arithmetic of one element, once, for host and device. Everything here has internal linkage: the CPU sources are
// compiled once per instruction set, and the linker must never mix their copies.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define SMPQ_HD static __host__ __device__ __forceinline__
#else
#define SMPQ_HD static inline __attribute__((always_inline))
#endif

namespace smpq {

// bfloat16 and float16 as their bits, so that no header of torch or CUDA is needed here.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// One channel of a grid. `Z` (the zero point's type) decides when rounding happens, as in torch:
// an integer zero point is added after rounding, a floating one before (with one rounding: fma).
template <class C>
struct Grid {
  C inv_scale, scale, zero_point, quant_min, quant_max;
  bool exact;  // (code - zero_point) has no rounding error in C; else the product is taken in double, as torch does
};

template <class C>
SMPQ_HD Grid<C> make_grid(C scale, C zero_point, int32_t quant_min, int32_t quant_max) {
  Grid<C> g;
  // 1 / scale overflows for denormal scales and is infinite for 0 (an all-zero channel): both must map 0 to 0, not NaN.
  const C largest = std::is_same<C, float>::value ? C(3.402823466e38) : C(1.7976931348623157e308);
  const C inverse = C(1) / scale;
  g.inv_scale = scale == C(0) ? C(0) : inverse > largest ? largest : inverse < -largest ? -largest : inverse;
  g.scale = scale;
  g.zero_point = zero_point;
  g.quant_min = C(quant_min);
  g.quant_max = C(quant_max);
  const C in_64ths = zero_point * C(64);
  g.exact = in_64ths == std::rint(in_64ths);
  return g;
}

// The integer code before clamping. NaN stays NaN.
template <class Z, class C>
SMPQ_HD C raw_code(C x, const Grid<C>& g) {
  if constexpr (std::is_integral<Z>::value) {
    return std::rint(x * g.inv_scale) + g.zero_point;
  } else {
    return std::rint(std::fma(x, g.inv_scale, g.zero_point)) +
           C(0);  // + 0: no negative zero, torch's codes are integers
  }
}

template <class C>
SMPQ_HD C clamp_code(C code, const Grid<C>& g) {
  code = code < g.quant_min ? g.quant_min : code;
  return code > g.quant_max ? g.quant_max : code;
}

template <class C>
SMPQ_HD C dequantize(C code, const Grid<C>& g) {
  return (code - g.zero_point) * g.scale;
}

template <class C>
SMPQ_HD C dequantize_inexact(C code, const Grid<C>& g) {
  return static_cast<C>((static_cast<double>(code) - static_cast<double>(g.zero_point)) * static_cast<double>(g.scale));
}

// Where the zero point is added after rounding, or is 0, it can be folded into the bounds, and clamping can come first:
// the same value with fewer operations.
template <class C>
struct FoldedGrid {
  C inv_scale, scale, low, high;
};

template <class Z, class C>
SMPQ_HD bool can_fold(const Grid<C>& g) {
  return std::is_integral<Z>::value || g.zero_point == C(0);
}

template <class C>
SMPQ_HD FoldedGrid<C> fold(const Grid<C>& g) {
  return FoldedGrid<C>{g.inv_scale, g.scale, g.quant_min - g.zero_point, g.quant_max - g.zero_point};
}

template <class C>
SMPQ_HD C fake_quantize_one(C x, const FoldedGrid<C>& g) {
  C steps = x * g.inv_scale;
  steps = steps < g.low ? g.low : steps;
  steps = steps > g.high ? g.high : steps;
  return (std::rint(steps) + C(0)) * g.scale;  // + 0: no negative zero
}

template <class Z, class C>
SMPQ_HD C fake_quantize_one(C x, const Grid<C>& g) {
  const C code = clamp_code(raw_code<Z>(x, g), g);
  return g.exact ? dequantize(code, g) : dequantize_inexact(code, g);
}

// Straight-through gradient of x, and LSQ gradients of scale and zero point (Esser et al., 2020, eq. 3), without a
// factor.
template <class C>
struct Gradient {
  C x, scale, zero_point;
};

template <class Z, class C>
SMPQ_HD Gradient<C> fake_quantize_gradient(C x, C grad, const Grid<C>& g) {
  const C raw = raw_code<Z>(x, g);
  const C code = clamp_code(raw, g);
  const bool inside = raw >= g.quant_min && raw <= g.quant_max;
  Gradient<C> d;
  d.x = grad * C(inside);
  const C value = g.exact ? dequantize(code, g) : dequantize_inexact(code, g);
  d.scale = inside ? grad * ((value - x) * g.inv_scale) : grad * (code - g.zero_point);
  d.zero_point = inside ? C(0) : -(grad * g.scale);
  return d;
}

// Conversions of one element.
SMPQ_HD float to_compute(float v) { return v; }
SMPQ_HD double to_compute(double v) { return v; }
SMPQ_HD float to_compute(BFloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
SMPQ_HD float to_compute(Float16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(v.bits & 0x7fffu) << 13;
  // Rebias the exponent by a multiplication: exact for normal and denormal numbers alike.
  uint32_t bits = rest;
  float f;
  memcpy(&f, &bits, 4);
  f *= 5.192296858534828e33f;  // 2^112
  memcpy(&bits, &f, 4);
  bits = (rest >= 0x0f800000u ? rest | 0x7f800000u : bits) | sign;  // infinities and NaN
  memcpy(&f, &bits, 4);
  return f;
}

template <class T>
struct Convert {
  SMPQ_HD T from(T v) { return v; }
};
template <>
struct Convert<BFloat16> {
  SMPQ_HD BFloat16 from(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return BFloat16{static_cast<uint16_t>(v != v ? 0x7fc0u : rounded)};
  }
};
template <>
struct Convert<Float16> {
  SMPQ_HD Float16 from(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    bits &= 0x7fffffffu;
    uint32_t out;
    if (bits > 0x7f800000u) {
      out = 0x7e00u;
    } else if (bits >= 0x477ff000u) {  // rounds to 65536 or more
      out = 0x7c00u;
    } else if (bits < 0x38800000u) {  // denormal in float16: let the float adder round at the right bit
      float f;
      memcpy(&f, &bits, 4);
      f += 0.5f;
      memcpy(&bits, &f, 4);
      out = bits - 0x3f000000u;
    } else {
      out = (bits + 0xc8000fffu + ((bits >> 13) & 1u)) >> 13;
    }
    return Float16{static_cast<uint16_t>(out | sign)};
  }
};

}  // namespace smpq
