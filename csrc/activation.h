// The functions that may end an Epilogue: the same sums and products for a float and for a vector of them, on host and
// device, and therefore the same bits.
#pragma once

#include "quant_math.h"

namespace smpq {

enum class Activation : int32_t { none, gelu, gelu_tanh, silu, hardswish };

template <class F>
SMPQ_HD void limit(F& t, float low, float high) {  // NaN stays
  t = t < low ? F{} + low : t;
  t = t > high ? F{} + high : t;
}

// erf and tanh as odd rational functions, fitted to the least relative error (2e-8 both) up to where float32 knows no
// difference from 1; what rounding adds is at most 5e-7.
template <class F>
SMPQ_HD void erf_of(F& y, const F& x) {
  F t = x;
  limit(t, -3.9f, 3.9f);
  const F s = t * t;
  y = (((((2.0664743e-6f * s + 2.8506198e-4f) * s + 3.7383365e-3f) * s + 5.266805e-2f) * s + 1.8966661e-1f) * s +
       1.1283791f) *
      t /
      (((((3.827002e-5f * s + 1.1573739e-3f) * s + 1.49142565e-2f) * s + 1.1381887e-1f) * s + 5.0142044e-1f) * s +
       1.0f);
}

template <class F>
SMPQ_HD void tanh_of(F& y, const F& x) {
  F t = x;
  limit(t, -9.0f, 9.0f);
  const F s = t * t;
  y = ((((1.3354479e-8f * s + 2.0608946e-5f) * s + 3.4955798e-3f) * s + 1.3381019e-1f) * s + 1.0f) * t /
      ((((7.7764827e-7f * s + 3.2856214e-4f) * s + 2.587695e-2f) * s + 4.6714336e-1f) * s + 1.0f);
}

template <Activation activation, class F>
SMPQ_HD void activate(F& y) {
  F share;
  if constexpr (activation == Activation::gelu) {
    erf_of(share, y * 0.70710678f);
  } else if constexpr (activation == Activation::gelu_tanh) {
    tanh_of(share, 0.79788456f * (y + 0.044715f * (y * y * y)));
  } else if constexpr (activation == Activation::silu) {
    tanh_of(share, y * 0.5f);
  } else {
    share = y + 3.0f;
    limit(share, 0.0f, 6.0f);
    y = y * share / 6.0f;
    return;
  }
  y = y * (0.5f + 0.5f * share);
}

}  // namespace smpq
