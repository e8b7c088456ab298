// fake_quantize on the CPU. Compiled once per instruction set, into the namespace SMPQ_ISA.
#include <algorithm>
#include <vector>

#include "../kernels.h"

namespace smpq::cpu::SMPQ_ISA {
namespace {

template <class T, class C, class Z>
Grid<C> grid_of(const FakeQuantizeArgs<T, C, Z>& a, int64_t channel) {
  return make_grid<C>(a.scale[channel], a.zero_point ? C(a.zero_point[channel]) : C(0),
                      a.quant_min ? a.quant_min[channel] : a.bound_min,
                      a.quant_max ? a.quant_max[channel] : a.bound_max);
}

template <class Z, class T, class C>
void run(const T* __restrict x, T* __restrict y, int64_t n, const Grid<C> g) {
  if (can_fold<Z>(g)) {
    const FoldedGrid<C> f = fold(g);
    for (int64_t i = 0; i < n; ++i) y[i] = Convert<T>::from(fake_quantize_one(to_compute(x[i]), f));
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = Convert<T>::from(fake_quantize_one<Z>(to_compute(x[i]), g));
  }
}

// Short runs (channels-last tensors, small filters): the grids of one period of elements, laid out element by element,
// so that the loop runs across channels.
template <class C>
struct Period {
  std::vector<C> inv_scale, scale, zero_point, quant_min, quant_max;
  bool exact = true;
};

template <class T, class C, class Z>
Period<C> make_period(const FakeQuantizeArgs<T, C, Z>& a) {
  Period<C> p;
  for (auto* v : {&p.inv_scale, &p.scale, &p.zero_point, &p.quant_min, &p.quant_max}) {
    v->resize(a.shape.channels * a.shape.inner);
  }
  for (int64_t c = 0, i = 0; c < a.shape.channels; ++c) {
    const Grid<C> g = grid_of(a, c);
    p.exact = p.exact && g.exact;
    for (int64_t k = 0; k < a.shape.inner; ++k, ++i) {
      p.inv_scale[i] = g.inv_scale;
      p.scale[i] = g.scale;
      p.zero_point[i] = g.zero_point;
      p.quant_min[i] = g.quant_min;
      p.quant_max[i] = g.quant_max;
    }
  }
  return p;
}

// y[i] = f(x[i], the grid of element i); `exact` is known outside, so that the loop has no branch.
template <bool exact, class T, class C, class F>
void run_period(const T* __restrict x, T* __restrict y, int64_t n, const Period<C>& p, int64_t start, F f) {
  const C* __restrict inv_scale = p.inv_scale.data() + start;
  const C* __restrict scale = p.scale.data() + start;
  const C* __restrict zero_point = p.zero_point.data() + start;
  const C* __restrict quant_min = p.quant_min.data() + start;
  const C* __restrict quant_max = p.quant_max.data() + start;
  for (int64_t i = 0; i < n; ++i) {
    y[i] = f(x[i], i, Grid<C>{inv_scale[i], scale[i], zero_point[i], quant_min[i], quant_max[i], exact});
  }
}

// The gradient of x where it stays, 0 where the code was clamped.
template <class Z, class T, class C>
SMPQ_HD T pass_gradient(T x, T grad, const Grid<C>& g) {
  const C raw = raw_code<Z>(to_compute(x), g);
  return Convert<T>::from(to_compute(grad) * C(raw >= g.quant_min && raw <= g.quant_max));
}

constexpr int64_t kShortRun = 64;
constexpr int64_t kLongestPeriod = 1 << 14;  // beyond, the tables would leave the cache

// Whether the grids are read element by element.
bool has_short_runs(const Shape3& s) {
  return s.channels > 1 && s.inner < kShortRun && s.channels * s.inner <= kLongestPeriod;
}

// Calls f(begin, end, channel) for each part of the elements [first, last) that lies in one channel.
template <class F>
void for_each_run(const Shape3& s, int64_t first, int64_t last, F&& f) {
  for (int64_t i = first; i < last;) {
    const int64_t end = std::min(last, (i / s.inner + 1) * s.inner);
    f(i, end, i / s.inner % s.channels);
    i = end;
  }
}

// Calls f(begin, end, start in the period) for each part of [first, last) that lies in one period.
template <class F>
void for_each_period(int64_t period, int64_t first, int64_t last, F&& f) {
  for (int64_t i = first; i < last;) {
    const int64_t start = i % period, end = std::min(last, i + period - start);
    f(i, end, start);
    i = end;
  }
}

}  // namespace

template <class T, class C, class Z>
void fake_quantize(const FakeQuantizeArgs<T, C, Z>& a, int64_t first, int64_t last) {
  if (!has_short_runs(a.shape)) {
    return for_each_run(a.shape, first, last, [&](int64_t i, int64_t end, int64_t channel) {
      run<Z>(a.x + i, a.y + i, end - i, grid_of(a, channel));
    });
  }
  const Period<C> p = make_period(a);
  const auto one = [](T x, int64_t, const Grid<C>& g) {
    return Convert<T>::from(fake_quantize_one<Z>(to_compute(x), g));
  };
  for_each_period(a.shape.channels * a.shape.inner, first, last, [&](int64_t i, int64_t end, int64_t start) {
    p.exact ? run_period<true>(a.x + i, a.y + i, end - i, p, start, one)
            : run_period<false>(a.x + i, a.y + i, end - i, p, start, one);
  });
}

template <class T, class C, class Z>
void fake_quantize_backward(const FakeQuantizeBackwardArgs<T, C, Z>& b, int64_t first, int64_t last) {
  const FakeQuantizeArgs<T, C, Z>& a = b.forward;
  if (!b.partial && has_short_runs(a.shape)) {
    const Period<C> p = make_period(a);
    return for_each_period(a.shape.channels * a.shape.inner, first, last, [&](int64_t i, int64_t end, int64_t start) {
      const T* __restrict grad = b.grad + i;
      run_period<true>(a.x + i, b.grad_x + i, end - i, p, start,
                       [grad](T x, int64_t k, const Grid<C>& g) { return pass_gradient<Z>(x, grad[k], g); });
    });
  }
  if (!b.partial) {
    return for_each_run(a.shape, first, last, [&](int64_t i, int64_t end, int64_t channel) {
      const Grid<C> g = grid_of(a, channel);
      const T* __restrict x = a.x;
      const T* __restrict grad = b.grad;
      T* __restrict grad_x = b.grad_x;
      for (; i < end; ++i) grad_x[i] = pass_gradient<Z>(x[i], grad[i], g);
    });
  }
  const int64_t per_run = pieces_per_run(a.shape), pieces = piece_count(a.shape);
  constexpr int kLanes = 16;
  for (int64_t piece = first; piece < last; ++piece) {
    const int64_t run_index = piece / per_run, offset = piece % per_run * kPiece;
    const int64_t n = std::min(kPiece, a.shape.inner - offset);
    const int64_t start = run_index * a.shape.inner + offset;
    const Grid<C> g = grid_of(a, run_index % a.shape.channels);
    const T* __restrict x = a.x + start;
    const T* __restrict grad = b.grad + start;
    T* __restrict grad_x = b.grad_x + start;
    C scale[kLanes] = {}, zero_point[kLanes] = {};
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t lanes = std::min<int64_t>(kLanes, n - i);
      for (int64_t k = 0; k < lanes; ++k) {
        const Gradient<C> d = fake_quantize_gradient<Z>(to_compute(x[i + k]), to_compute(grad[i + k]), g);
        grad_x[i + k] = Convert<T>::from(d.x);
        scale[k] += d.scale;
        zero_point[k] += d.zero_point;
      }
    }
    double scale_sum = 0, zero_point_sum = 0;
    for (int k = 0; k < kLanes; ++k) {
      scale_sum += scale[k];
      zero_point_sum += zero_point[k];
    }
    b.partial[piece] = scale_sum;
    b.partial[pieces + piece] = zero_point_sum;
  }
}

#define SMPQ_INSTANTIATE(T, C, Z)                                                           \
  template void fake_quantize<T, C, Z>(const FakeQuantizeArgs<T, C, Z>&, int64_t, int64_t); \
  template void fake_quantize_backward<T, C, Z>(const FakeQuantizeBackwardArgs<T, C, Z>&, int64_t, int64_t);
SMPQ_FOR_EACH_TYPE(SMPQ_INSTANTIATE)

}  // namespace smpq::cpu::SMPQ_ISA
