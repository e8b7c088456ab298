// coalition_fake_quantize on the CPU. Compiled once per instruction set, into the namespace SMPQ_ISA.
#include <algorithm>
#include <vector>

#include "../kernels.h"

namespace smpq::cpu::SMPQ_ISA {
namespace {

template <class T, class C, class Z>
Grid<C> grid_of(const CoalitionArgs<T, C, Z>& a, int64_t c, int64_t channel) {
  const int64_t p = a.per_channel ? c * a.shape.channels + channel : c;
  return make_grid<C>(a.scale[p], a.zero_point ? C(a.zero_point[p]) : C(0), a.quant_min[c], a.quant_max[c]);
}

// Calls f(begin, end, channel) for each part of the block [offset, offset + n) that lies in one channel.
template <class Args, class F>
void for_each_run(const Args& a, int64_t offset, int64_t n, F&& f) {
  if (!a.per_channel) return f(int64_t{0}, n, int64_t{0});
  for (int64_t i = 0; i < n;) {
    const int64_t run = (offset + i) / a.shape.inner;
    const int64_t end = std::min(n, (run + 1) * a.shape.inner - offset);
    f(i, end, run % a.shape.channels);
    i = end;
  }
}

// The values of one block for candidate c, left in the first-level cache for all rows that use them.
template <class T, class C, class Z>
void quantize_block(const CoalitionArgs<T, C, Z>& a, int64_t c, const T* __restrict x, int64_t offset, int64_t n,
                    C* __restrict out) {
  for_each_run(a, offset, n, [&](int64_t begin, int64_t end, int64_t channel) {
    const Grid<C> g = grid_of(a, c, channel);
    if (can_fold<Z>(g)) {
      const FoldedGrid<C> f = fold(g);
      for (int64_t i = begin; i < end; ++i) out[i] = fake_quantize_one(to_compute(x[i]), f);
    } else {
      for (int64_t i = begin; i < end; ++i) out[i] = fake_quantize_one<Z>(to_compute(x[i]), g);
    }
  });
}

// One row alone: all its candidates in registers, nothing goes through memory.
template <int count, class T, class C>
void quantize_and_mix(const FoldedGrid<C>* grids, const C* weights, const T* __restrict x, int64_t n, T* __restrict y) {
  FoldedGrid<C> g[count];
  C w[count];
  std::copy(grids, grids + count, g);
  std::copy(weights, weights + count, w);
  for (int64_t i = 0; i < n; ++i) {
    const C v = to_compute(x[i]);
    C total = w[0] * fake_quantize_one(v, g[0]);
#pragma GCC unroll 8
    for (int k = 1; k < count; ++k) total += w[k] * fake_quantize_one(v, g[k]);
    y[i] = Convert<T>::from(total);
  }
}

constexpr int64_t kInRegisters = 5;

// False where a grid does not fold or the row has too many candidates.
template <class T, class C, class Z>
bool quantize_and_mix(const CoalitionArgs<T, C, Z>& a, const C* mixture, const T* x, int64_t offset, int64_t n, T* y) {
  int64_t candidates[kInRegisters], count = 0;
  C weights[kInRegisters];
  for (int64_t c = 0; c < a.candidates; ++c) {
    if (mixture[c] == C(0)) continue;
    if (count == kInRegisters) return false;
    weights[count] = mixture[c];
    candidates[count++] = c;
  }
  bool folds = true;
  for_each_run(a, offset, n, [&](int64_t begin, int64_t end, int64_t channel) {
    FoldedGrid<C> grids[kInRegisters];
    for (int64_t k = 0; k < count; ++k) {
      const Grid<C> g = grid_of(a, candidates[k], channel);
      folds = folds && can_fold<Z>(g);
      grids[k] = fold(g);
    }
    if (!folds) return;
    switch (count) {
      case 0:
        return std::fill(y + begin, y + end, Convert<T>::from(C(0)));
      case 1:
        return quantize_and_mix<1>(grids, weights, x + begin, end - begin, y + begin);
      case 2:
        return quantize_and_mix<2>(grids, weights, x + begin, end - begin, y + begin);
      case 3:
        return quantize_and_mix<3>(grids, weights, x + begin, end - begin, y + begin);
      case 4:
        return quantize_and_mix<4>(grids, weights, x + begin, end - begin, y + begin);
      default:
        return quantize_and_mix<5>(grids, weights, x + begin, end - begin, y + begin);
    }
  });
  return folds;
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
    case 1:
      return mix<1>(values, weights, n, y);
    case 2:
      return mix<2>(values, weights, n, y);
    case 3:
      return mix<3>(values, weights, n, y);
    case 4:
      return mix<4>(values, weights, n, y);
    case 5:
      return mix<5>(values, weights, n, y);
    default:
      break;
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
    if (end - begin == 1) {
      const int64_t row = children[begin];
      const C* mixture = a.mixtures + row * a.candidates;
      if (quantize_and_mix(a, mixture, x, offset, n, a.y + row * elements + offset)) continue;
    }
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

#define SMPQ_INSTANTIATE(T, C, Z)                                                                               \
  template void coalition_fake_quantize<T, C, Z>(const CoalitionArgs<T, C, Z>&, const int64_t*, const int64_t*, \
                                                 int64_t, int64_t);
SMPQ_FOR_EACH_TYPE(SMPQ_INSTANTIATE)

}  // namespace smpq::cpu::SMPQ_ISA
