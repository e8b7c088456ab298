// quantization_error on the CPU. Compiled once per instruction set, into the namespace SMPQ_ISA.
#include <algorithm>

#include "../kernels.h"

namespace smpq::cpu::SMPQ_ISA {
namespace {

constexpr int kLanes = 32;  // independent sums, so that the loop vectorises without reassociating

template <class T, class F>
double squared_error(const T* __restrict x, int64_t n, F&& fake_quantize) {
  using C = decltype(to_compute(*x));
  const auto square = [&](T element) {
    const C v = to_compute(element), error = fake_quantize(v) - v;
    return error * error;
  };
  C sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) sums[k] += square(x[i + k]);
  }
  double total = 0;
  for (; i < n; ++i) total += square(x[i]);
  for (int k = 0; k < kLanes; ++k) total += sums[k];
  return total;
}

}  // namespace

template <class T, class C, class Z>
void quantization_error(const QuantizationErrorArgs<T, C, Z>& a, int64_t first, int64_t last) {
  const int64_t per_run = pieces_per_run(a.shape), pieces = piece_count(a.shape);
  for (int64_t piece = first; piece < last; ++piece) {
    const int64_t run = piece / per_run, offset = piece % per_run * kPiece;
    const int64_t n = std::min(kPiece, a.shape.inner - offset);
    const T* x = a.x + run * a.shape.inner + offset;
    for (int64_t c = 0; c < a.candidates; ++c) {
      const int64_t p = a.per_channel ? c * a.shape.channels + run % a.shape.channels : c;
      const Grid<C> g =
          make_grid<C>(a.scale[p], a.zero_point ? C(a.zero_point[p]) : C(0), a.quant_min[c], a.quant_max[c]);
      const FoldedGrid<C> f = fold(g);
      a.partial[c * pieces + piece] = can_fold<Z>(g)
                                          ? squared_error(x, n, [f](C v) { return fake_quantize_one(v, f); })
                                          : squared_error(x, n, [g](C v) { return fake_quantize_one<Z>(v, g); });
    }
  }
}

#define SMPQ_INSTANTIATE(T, C, Z) \
  template void quantization_error<T, C, Z>(const QuantizationErrorArgs<T, C, Z>&, int64_t, int64_t);
SMPQ_FOR_EACH_TYPE(SMPQ_INSTANTIATE)

}  // namespace smpq::cpu::SMPQ_ISA
