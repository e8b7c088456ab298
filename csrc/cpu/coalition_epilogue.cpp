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

}  // namespace

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
