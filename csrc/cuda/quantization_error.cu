// quantization_error: the squared error of every candidate, nothing materialised. x comes from memory once; with more
// than kCandidates candidates a piece (16 KB in fp32) is read again from the cache. A thread adds up its few squares
// (32 at most, and a few at the ends of a piece) in C, for many GPUs convert to double slowly; the sums of threads in
// double.
#include "pieces.cuh"

namespace smpq {
namespace cuda {
namespace {

constexpr int kCandidates = 8;  // grids and sums that a thread keeps in registers

template <bool kBlock, bool kWide, class T, class C, class Z>
__global__ void __launch_bounds__(kThreads) squared_error(const QuantizationErrorArgs<T, C, Z> a, const Pieces pieces) {
  constexpr int N = kWide ? kLanes<T> : 1;
  const Share share = share_of<kBlock>(pieces);
  for (int64_t first = 0; first < a.candidates; first += kCandidates) {
    const int64_t left = a.candidates - first;
    Grid<C> grid[kCandidates];
    C sum[kCandidates];
#pragma unroll
    for (int c = 0; c < kCandidates; ++c) {
      const int64_t candidate = first + (c < left ? c : 0);
      const int64_t index = a.per_channel ? candidate * pieces.shape.channels + share.channel : candidate;
      grid[c] = grid_at(a.scale, a.zero_point, index, a.quant_min[candidate], a.quant_max[candidate]);
      sum[c] = 0;
    }
    const auto one = [&](T element) {
      const C x = to_compute(element);
#pragma unroll
      for (int c = 0; c < kCandidates; ++c) {
        if (c < left) {
          const C error = fake_quantize_one<Z>(x, grid[c]) - x;
          sum[c] += error * error;
        }
      }
    };
    for_share<kBlock, N>(
        share, pieces.group,
        [&](int64_t i) {
          const Pack<T, N> x = load_pack<N>(a.x + i, N);
#pragma unroll
          for (int k = 0; k < N; ++k) one(x.item[k]);
        },
        [&](int64_t i) { one(a.x[i]); });
    double total_of[kCandidates];
#pragma unroll
    for (int c = 0; c < kCandidates; ++c) total_of[c] = static_cast<double>(sum[c]);
    reduce<kBlock>(total_of, share, pieces.group, block_shared<Sums<kCandidates>>(), [&](int c, double total) {
      if (c < left) a.partial[(first + c) * pieces.count + share.piece] = total;
    });
  }
}

}  // namespace

template <class T, class C, class Z>
void quantization_error(const QuantizationErrorArgs<T, C, Z>& args, void* stream) {
  if (args.shape.elements() == 0 || args.candidates == 0) return;
  const Pieces pieces = pieces_of<T>(args.shape);
  const bool block = pieces.group == kThreads, wide = aligned(args.x);
  const auto kernel = block ? (wide ? squared_error<true, true, T, C, Z> : squared_error<true, false, T, C, Z>)
                            : (wide ? squared_error<false, true, T, C, Z> : squared_error<false, false, T, C, Z>);
  launch("quantization_error", kernel, blocks_of(pieces), sizeof(Sums<kCandidates>), stream, args, pieces);
}

#define SMPQ_INSTANTIATE(T, C, Z) \
  template void quantization_error<T, C, Z>(const QuantizationErrorArgs<T, C, Z>&, void*);
SMPQ_FOR_EACH_TYPE(SMPQ_INSTANTIATE)
#undef SMPQ_INSTANTIATE

}  // namespace cuda
}  // namespace smpq
