// coalition_fake_quantize on the CPU. Compiled once per instruction set, into the namespace SMPQ_ISA.
#include <algorithm>
#include <vector>

#include "../kernels.h"

namespace smpq::cpu::SMPQ_ISA {
namespace {

// The values of one block for candidate c, left in the first-level cache for all rows that use them.
template <class T, class C, class Z>
void quantize_block(const CoalitionArgs<T, C, Z>& a, int64_t c, const T* __restrict x, int64_t offset, int64_t n,
                    C* __restrict out) {
  const int64_t inner = a.per_channel ? a.shape.inner : a.shape.elements();
  for (int64_t i = 0; i < n;) {
    const int64_t run = (offset + i) / inner;
    const int64_t end = std::min(n, (run + 1) * inner - offset);
    const int64_t p = a.per_channel ? c * a.shape.channels + run % a.shape.channels : c;
    const Grid<C> g = make_grid<C>(a.scale[p], a.zero_point ? C(a.zero_point[p]) : C(0), a.quant_min[c], a.quant_max[c]);
    if (g.exact) {
      for (int64_t k = i; k < end; ++k) out[k] = dequantize(clamp_code(raw_code<Z>(to_compute(x[k]), g), g), g);
    } else {
      for (int64_t k = i; k < end; ++k) out[k] = dequantize_inexact(clamp_code(raw_code<Z>(to_compute(x[k]), g), g), g);
    }
    i = end;
  }
}

template <int count, class T, class C>
void mix(const C* const* values, const C* weights, int64_t n, T* __restrict y) {
  for (int64_t i = 0; i < n; ++i) {
    C total = weights[0] * values[0][i];
#pragma GCC unroll 8
    for (int k = 1; k < count; ++k) total += weights[k] * values[k][i];
    y[i] = Convert<T>::from(total);
  }
}

// y = sum_k weights[k] * values[k], added in order.
template <class T, class C>
void mix(const C* const* values, const C* weights, int64_t count, int64_t n, T* __restrict y, C* __restrict scratch) {
  switch (count) {
    case 1: return mix<1>(values, weights, n, y);
    case 2: return mix<2>(values, weights, n, y);
    case 3: return mix<3>(values, weights, n, y);
    case 4: return mix<4>(values, weights, n, y);
    case 5: return mix<5>(values, weights, n, y);
    default: break;
  }
  mix<5, C, C>(values, weights, n, scratch);
  for (int64_t k = 5; k < count; ++k) {
    for (int64_t i = 0; i < n; ++i) scratch[i] += weights[k] * values[k][i];
  }
  for (int64_t i = 0; i < n; ++i) y[i] = Convert<T>::from(scratch[i]);
}

}  // namespace

template <class T, class C, class Z>
void coalition_fake_quantize(const CoalitionArgs<T, C, Z>& a, const int64_t* child_begin, const int64_t* children,
                             int64_t first, int64_t last) {
  const int64_t elements = a.shape.elements(), blocks = coalition_blocks(a.shape);
  std::vector<C> values((a.candidates + 1) * kCoalitionBlock);
  C* scratch = values.data() + a.candidates * kCoalitionBlock;
  std::vector<char> used(a.candidates);
  std::vector<const C*> terms(a.candidates);
  std::vector<C> weights(a.candidates);
  int64_t used_of = -1;  // the parent whose children `used` tells of
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t parent = unit / blocks, offset = unit % blocks * kCoalitionBlock;
    const int64_t n = std::min(kCoalitionBlock, elements - offset);
    const int64_t begin = child_begin[parent], end = child_begin[parent + 1];
    if (used_of != parent) {
      std::fill(used.begin(), used.end(), 0);
      for (int64_t k = begin; k < end; ++k) {
        for (int64_t c = 0; c < a.candidates; ++c) used[c] |= a.mixtures[children[k] * a.candidates + c] != C(0);
      }
      used_of = parent;
    }
    const T* x = a.x + parent * elements + offset;
    for (int64_t c = 0; c < a.candidates; ++c) {
      if (used[c]) quantize_block(a, c, x, offset, n, values.data() + c * kCoalitionBlock);
    }
    for (int64_t k = begin; k < end; ++k) {
      const C* mixture = a.mixtures + children[k] * a.candidates;
      int64_t count = 0;
      for (int64_t c = 0; c < a.candidates; ++c) {
        if (mixture[c] == C(0)) continue;
        weights[count] = mixture[c];
        terms[count++] = values.data() + c * kCoalitionBlock;
      }
      T* y = a.y + children[k] * elements + offset;
      if (count == 0) {
        std::fill(y, y + n, Convert<T>::from(C(0)));
      } else {
        mix(terms.data(), weights.data(), count, n, y, scratch);
      }
    }
  }
}

#define SMPQ_INSTANTIATE(T, C, Z) \
  template void coalition_fake_quantize<T, C, Z>(const CoalitionArgs<T, C, Z>&, const int64_t*, const int64_t*, int64_t, int64_t);
SMPQ_FOR_EACH_TYPE(SMPQ_INSTANTIATE)

}  // namespace smpq::cpu::SMPQ_ISA
