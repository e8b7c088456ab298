// coalition_epilogue on the CPU. Compiled once per instruction set, into the namespace SMPQ_ISA.
#include <algorithm>

#include "epilogue.h"

namespace smpq::cpu::SMPQ_ISA {
namespace {

const float* values_of(const EpilogueArgs& a, int64_t row) {
  return a.values + (a.parent ? a.parent[row] : row - a.first_row) * a.epilogue.pixels * a.epilogue.channels;
}

// Marks the samples of pixels [pixel, pixel + T) that hold NaN in one of these channels.
template <int T>
SMPQ_INLINE void find_nan(const EpilogueArgs& a, int64_t row, int64_t pixel, const Floats (&y)[T]) {
  Ints found{};
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) found |= y[t] != y[t];
  if (!any(found)) return;
  for (int t = 0; t < T; ++t) {
    const bool broken = any(y[t] != y[t]);
    if (broken) __atomic_store_n(a.broken + (row * a.epilogue.pixels + pixel + t) / a.plane, true, __ATOMIC_RELAXED);
  }
}

template <bool whole>
void block(const EpilogueArgs& a, int64_t row, int64_t first, int64_t last, int64_t channel) {
  const Epilogue& e = a.epilogue;
  const int n = static_cast<int>(std::min<int64_t>(kLanes, e.channels - channel));
  Floats scale = Floats{} + 1.0f, bias{};
  if (e.scale) load_lanes<whole>(scale, e.scale + row * e.channels + channel, n);
  if (e.bias) load_lanes<whole>(bias, e.bias + row * e.channels + channel, n);
  const float* x = values_of(a, row) + channel;
  const int64_t channels = e.channels;
  const bool affine = e.scale;
  int64_t pixel = first;
  const auto some = [&](auto count) __attribute__((always_inline)) {
    constexpr int T = decltype(count)::value;
    for (; pixel + T <= last; pixel += T) {
      Floats y[T];
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        load_lanes<whole>(y[t], x + (pixel + t) * channels, n);
      }
      if (a.broken) find_nan(a, row, pixel, y);
      if (affine) {
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) y[t] = y[t] * scale + bias;
      }
      finish_lanes<T, whole>(e, row, pixel, channel, y, n);
    }
  };
  some(std::integral_constant<int, 8>{});
  some(std::integral_constant<int, 1>{});
}

// At most four channels, as in an image: four pixels at once.
void narrow(const EpilogueArgs& a, int64_t row, int64_t first, int64_t last) {
  const Epilogue& e = a.epilogue;
  constexpr int kWide = 4, kPixels = kLanes / kWide;
  const size_t bytes = e.channels * sizeof(float);
  Floats scale = Floats{} + 1.0f, bias{};
  Shorts there{};
  for (int k = 0; k < kPixels; ++k) {
    for (int c = 0; c < e.channels; ++c) {
      there[k * kWide + c] = -1;
      if (e.scale) scale[k * kWide + c] = e.scale[row * e.channels + c];
      if (e.bias) bias[k * kWide + c] = e.bias[row * e.channels + c];
    }
  }
  const float* x = values_of(a, row);
  const float* residual = e.residual ? e.residual + e.residual_row[row] * e.pixels * e.channels : nullptr;
  const auto put = [&](float* to, int64_t pixel, int pixels, const Floats& y) {
    float value[kLanes];
    std::memcpy(value, &y, sizeof y);
    for (int k = 0; k < pixels; ++k) std::memcpy(to + (pixel + k) * e.channels, value + k * kWide, bytes);
  };
  for (int64_t pixel = first; pixel < last; pixel += kPixels) {
    const int pixels = static_cast<int>(std::min<int64_t>(kPixels, last - pixel));
    float value[kLanes] = {}, other[kLanes] = {};
    for (int k = 0; k < pixels; ++k) {
      std::memcpy(value + k * kWide, x + (pixel + k) * e.channels, bytes);
      if (residual) std::memcpy(other + k * kWide, residual + (pixel + k) * e.channels, bytes);
    }
    Floats y, added;
    load(y, value);
    load(added, other);
    if (a.broken) {
      for (int k = 0; k < pixels; ++k) {
        Floats one{};
        std::memcpy(&one, value + k * kWide, bytes);
        find_nan<1>(a, row, pixel + k, {one});
      }
    }
    if (e.scale) y = y * scale + bias;
    if (residual) y = e.multiplies ? y * added : y + added;
    clamp(y, e.low, e.high);
    activate_all(&y, 1, e.activation);
    if (e.values) put(e.values + row * e.pixels * e.channels, pixel, pixels, y);
    for (int64_t c = e.child_begin[row]; c < e.child_begin[row + 1]; ++c) {
      const Child& child = e.children[c];
      if (child.codes) {
        Bytes codes;
        quantize(codes, y, child);
        codes &= __builtin_convertvector(there, Bytes);
        std::memcpy(child.codes + pixel * kWide, &codes, pixels * kWide);
      } else if (child.fixed) {
        Shorts fixed;
        fix(fixed, y, child);
        fixed &= there;
        std::memcpy(child.fixed + pixel * kWide, &fixed, pixels * kWide * sizeof(int16_t));
      } else {
        Floats mixed;
        mix(mixed, y, child);
        put(child.mixed, pixel, pixels, mixed);
      }
    }
  }
}

void moments_of(const EpilogueArgs& a, int64_t row, int64_t first, int64_t last, int64_t channel, double* to) {
  const int64_t channels = a.epilogue.channels;
  const int n = static_cast<int>(std::min<int64_t>(kLanes, channels - channel));
  const float* x = values_of(a, row) + channel;
  Moments moments{};
  for (int64_t pixel = first; pixel < last; ++pixel) {
    Floats value;
    n == kLanes ? load_lanes<true>(value, x + pixel * channels, n) : load_lanes<false>(value, x + pixel * channels, n);
    moments.add(value);
  }
  moments.store(to + channel, to + channels + channel, n);
}

}  // namespace

void coalition_moments(const EpilogueArgs& a, double* moments, int64_t first_unit, int64_t last_unit) {
  const Epilogue& e = a.epilogue;
  const int64_t units = epilogue_units(e);
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    const int64_t row = a.first_row + unit / units, first = unit % units * kEpiloguePixels;
    const int64_t last = std::min(first + kEpiloguePixels, e.pixels);
    for (int64_t channel = 0; channel < e.channels; channel += kLanes) {
      moments_of(a, row, first, last, channel, moments + unit * 2 * e.channels);
    }
  }
}

void coalition_epilogue(const EpilogueArgs& a, int64_t first_unit, int64_t last_unit) {
  const Epilogue& e = a.epilogue;
  const int64_t units = epilogue_units(e);
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    const int64_t row = unit / units, first = unit % units * kEpiloguePixels;
    const int64_t last = std::min(first + kEpiloguePixels, e.pixels);
    if (e.channels <= 4) {
      narrow(a, row, first, last);
      continue;
    }
    int64_t channel = 0;
    for (; channel + kLanes <= e.channels; channel += kLanes) block<true>(a, row, first, last, channel);
    if (channel < e.channels) block<false>(a, row, first, last, channel);
  }
}

}  // namespace smpq::cpu::SMPQ_ISA
