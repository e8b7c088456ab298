// coalition_epilogue on the CPU. Compiled once per instruction set, into the namespace SMPQ_ISA.
#include <algorithm>

#include "epilogue.h"

namespace smpq::cpu::SMPQ_ISA {
namespace {

template <bool whole>
void block(const EpilogueArgs& a, int64_t row, int64_t first, int64_t last, int64_t channel) {
  const Epilogue& e = a.epilogue;
  const int n = whole ? kLanes : static_cast<int>(e.channels - channel);
  const int n_codes = whole ? kLanes : static_cast<int>(e.code_channels - channel);
  const size_t bytes = n * sizeof(float);
  Floats scale = Floats{} + 1.0f, bias{};
  if (e.scale) std::memcpy(&scale, e.scale + row * e.channels + channel, bytes);
  if (e.bias) std::memcpy(&bias, e.bias + row * e.channels + channel, bytes);
  const float* x = a.values + a.parent[row] * e.pixels * e.channels + channel;
  for (int64_t pixel = first; pixel < last; ++pixel) {
    Floats value{};
    std::memcpy(&value, x + pixel * e.channels, whole ? sizeof(Floats) : bytes);
    finish<whole>(e, row, pixel, channel, e.scale ? value * scale + bias : value, n, n_codes);
  }
}

void moments_of(const EpilogueArgs& a, int64_t row, int64_t first, int64_t last, int64_t channel, double* to) {
  const int64_t channels = a.epilogue.channels;
  const int n = static_cast<int>(std::min<int64_t>(kLanes, channels - channel));
  const float* x = a.values + a.parent[row] * a.epilogue.pixels * channels + channel;
  Doubles sum{}, square{};
  for (int64_t pixel = first; pixel < last; ++pixel) {
    Floats value{};
    std::memcpy(&value, x + pixel * channels, n == kLanes ? sizeof value : n * sizeof(float));
    const Doubles exact = __builtin_convertvector(value, Doubles);
    sum += exact;
    square += exact * exact;
  }
  std::memcpy(to + channel, &sum, n * sizeof(double));
  std::memcpy(to + channels + channel, &square, n * sizeof(double));
}

}  // namespace

void coalition_moments(const EpilogueArgs& a, int64_t first_row, double* moments, int64_t first_unit,
                       int64_t last_unit) {
  const Epilogue& e = a.epilogue;
  const int64_t units = epilogue_units(e);
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    const int64_t row = first_row + unit / units, first = unit % units * kEpiloguePixels;
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
    int64_t channel = 0;
    for (; channel + kLanes <= e.channels; channel += kLanes) block<true>(a, row, first, last, channel);
    if (channel < e.channels) block<false>(a, row, first, last, channel);
  }
}

}  // namespace smpq::cpu::SMPQ_ISA
