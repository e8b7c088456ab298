// fake_quantize and its gradient: bound by memory, 8 bytes an element in fp32 (12 for the gradient).
//
// Two mappings of threads to elements, each for the forward and the straight-through gradient:
//   flat      a block takes a tile of neighbouring elements. Most tiles lie in one channel's run (always so per
//   tensor);
//             then the grid is read once per thread and tile. Else each vector reads the grid of its first element, and
//             of the next channel where it crosses into one.
//   periodic  short runs (channels last): a thread strides over the tensor by a multiple of the period channels *
//   inner,
//             so that its elements keep their channels, and the grids stay in registers.
// The LSQ sums have a third one, by pieces (pieces.cuh).
#include "pieces.cuh"

namespace smpq {
namespace cuda {
namespace {

template <class T, class C, class Z>
struct Operands {
  const T* x;
  const T* grad;  // unused by the forward
  T* out;
  const C* scale;
  const Z* zero_point;
  const int32_t* quant_min;
  const int32_t* quant_max;
  int32_t bound_min, bound_max;
  int64_t elements, channels, inner;

  __device__ __forceinline__ Grid<C> grid(int64_t channel) const {
    return grid_at(scale, zero_point, channel, quant_min ? quant_min[channel] : bound_min,
                   quant_max ? quant_max[channel] : bound_max);
  }
};

template <class T, class C, class Z>
Operands<T, C, Z> operands(const FakeQuantizeArgs<T, C, Z>& a, const T* grad, T* out) {
  const int64_t elements = a.shape.elements();
  const int64_t inner = a.shape.channels == 1 ? elements : a.shape.inner;  // one channel is one run
  return {a.x,         grad,        out,         a.scale,  a.zero_point,     a.quant_min,
          a.quant_max, a.bound_min, a.bound_max, elements, a.shape.channels, inner};
}

template <bool kBackward, class Z, class T, class C>
__device__ __forceinline__ T result(T x, T grad, const Grid<C>& grid) {
  if constexpr (kBackward) {
    return Convert<T>::from(fake_quantize_gradient<Z>(to_compute(x), to_compute(grad), grid).x);
  } else {
    return Convert<T>::from(fake_quantize_one<Z>(to_compute(x), grid));
  }
}

// By fields: choosing between two structs by address would put both into local memory.
template <class C>
__device__ __forceinline__ Grid<C> choose(bool first, const Grid<C>& a, const Grid<C>& b) {
  return {first ? a.inv_scale : b.inv_scale, first ? a.scale : b.scale,         first ? a.zero_point : b.zero_point,
          first ? a.quant_min : b.quant_min, first ? a.quant_max : b.quant_max, first ? a.exact : b.exact};
}

constexpr int kPacks = 4;  // independent loads in flight per thread
template <bool kWide, class T>
constexpr int kTile = kThreads * kPacks * (kWide ? kLanes<T> : 2);

// kWide: all pointers are 16-byte aligned and inner >= kLanes, so that a vector meets at most two channels.
template <bool kBackward, bool kWide, class T, class C, class Z>
__global__ void __launch_bounds__(kThreads) flat(const Operands<T, C, Z> a) {
  constexpr int N = kWide ? kLanes<T> : 1;
  constexpr int kLoads = kTile<kWide, T> / (kThreads * N);
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kTile<kWide, T>;
  const int thread = static_cast<int>(threadIdx.x);

  Pack<T, N> x[kLoads], grad[kLoads] = {};
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    const int64_t at = tile + (j * kThreads + thread) * N;
    x[j] = load_pack<N>(a.x + at, a.elements - at);
    if constexpr (kBackward) grad[j] = load_pack<N>(a.grad + at, a.elements - at);
  }

  const int64_t run = tile / a.inner;
  const int64_t start = tile - run * a.inner;
  const int64_t channel = run % a.channels;
  if (start + kTile<kWide, T> <= a.inner || a.inner >= a.elements) {
    const Grid<C> grid = a.grid(channel);
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int64_t at = tile + (j * kThreads + thread) * N;
#pragma unroll
      for (int k = 0; k < N; ++k) x[j].item[k] = result<kBackward, Z>(x[j].item[k], grad[j].item[k], grid);
      store_pack<N>(a.out + at, x[j], a.elements - at);
    }
    return;
  }

#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    const int64_t at = tile + (j * kThreads + thread) * N;
    if (at >= a.elements) break;
    const int64_t position = start + (at - tile);  // counted from the start of the tile's first run
    // Below two tiles the division fits 32 bits, several times cheaper; above, the tile meets two runs at most.
    const int64_t crossed = a.inner > kTile<kWide, T>
                                ? position >= a.inner
                                : static_cast<uint32_t>(position) / static_cast<uint32_t>(a.inner);
    int64_t here = channel + crossed;
    if (here >= a.channels) here %= a.channels;
    const int64_t left = (crossed + 1) * a.inner - position;  // elements up to the next channel
    const Grid<C> grid = a.grid(here);
    if constexpr (N == 1) {
      x[j].item[0] = result<kBackward, Z>(x[j].item[0], grad[j].item[0], grid);
    } else {
      Grid<C> next = grid;
      if (left < N) next = a.grid(here + 1 < a.channels ? here + 1 : 0);
#pragma unroll
      for (int k = 0; k < N; ++k)
        x[j].item[k] = result<kBackward, Z>(x[j].item[k], grad[j].item[k], choose(k < left, grid, next));
    }
    store_pack<N>(a.out + at, x[j], a.elements - at);
  }
}

// `columns` vectors make a period (or a few, if a period is not a multiple of N), `stride` is a multiple of it.
template <bool kBackward, bool kWide, class T, class C, class Z>
__global__ void __launch_bounds__(kThreads)
    periodic(const Operands<T, C, Z> a, const int64_t columns, const int64_t stride) {
  constexpr int N = kWide ? kLanes<T> : 1;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (first >= stride) return;
  const int64_t period = a.channels * a.inner;
  Grid<C> grid[N];
#pragma unroll
  for (int k = 0; k < N; ++k) grid[k] = a.grid((first % columns * N + k) % period / a.inner);

  const int64_t packs = (a.elements + N - 1) / N;
  for (int64_t p = first; p < packs; p += stride * kPacks) {
    Pack<T, N> x[kPacks], grad[kPacks] = {};
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const int64_t at = (p + j * stride) * N;
      x[j] = load_pack<N>(a.x + at, a.elements - at);
      if constexpr (kBackward) grad[j] = load_pack<N>(a.grad + at, a.elements - at);
    }
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const int64_t at = (p + j * stride) * N;
#pragma unroll
      for (int k = 0; k < N; ++k) x[j].item[k] = result<kBackward, Z>(x[j].item[k], grad[j].item[k], grid[k]);
      store_pack<N>(a.out + at, x[j], a.elements - at);
    }
  }
}

template <bool kBackward, bool kWide, class T, class C, class Z>
void run(const char* name, const Operands<T, C, Z>& a, int64_t outer, void* stream) {
  constexpr int64_t N = kWide ? kLanes<T> : 1;
  if (a.channels > 1 && a.inner < 16 && outer >= 2 * kPacks) {
    const int64_t period = a.channels * a.inner;
    const int64_t columns = period % N == 0 ? period / N : period;
    const int64_t packs = (a.elements + N - 1) / N;
    // Enough threads to fill the device, but so few that each finds work for its grids.
    const int64_t resident =
        device_attribute(cudaDevAttrMultiProcessorCount) * device_attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
    const int64_t wanted = resident < packs / kPacks ? resident : packs / kPacks;
    const int64_t stride = (wanted / columns + 1) * columns;
    launch(name, periodic<kBackward, kWide, T, C, Z>, (stride + kThreads - 1) / kThreads, 0, stream, a, columns,
           stride);
    return;
  }
  if constexpr (kWide) {
    if (a.inner < N && a.channels > 1) {
      run<kBackward, false>(name, a, outer, stream);
      return;
    }
  }
  const int64_t tiles = (a.elements + kTile<kWide, T> - 1) / kTile<kWide, T>;
  launch(name, flat<kBackward, kWide, T, C, Z>, tiles, 0, stream, a);
}

template <bool kBlock, bool kWide, class T, class C, class Z>
__global__ void __launch_bounds__(kThreads)
    gradient_sums(const Operands<T, C, Z> a, const Pieces pieces, double* const partial) {
  constexpr int N = kWide ? kLanes<T> : 1;
  const Share share = share_of<kBlock>(pieces);
  double sum[2] = {0, 0};
  if (share.length > 0) {
    const Grid<C> grid = a.grid(share.channel);
    const auto one = [&](T x, T grad) {
      const Gradient<C> d = fake_quantize_gradient<Z>(to_compute(x), to_compute(grad), grid);
      sum[0] += static_cast<double>(d.scale);
      sum[1] += static_cast<double>(d.zero_point);
      return Convert<T>::from(d.x);
    };
    for_share<kBlock, N>(
        share, pieces.group,
        [&](int64_t i) {
          Pack<T, N> x = load_pack<N>(a.x + i, N);
          const Pack<T, N> grad = load_pack<N>(a.grad + i, N);
#pragma unroll
          for (int k = 0; k < N; ++k) x.item[k] = one(x.item[k], grad.item[k]);
          store_pack<N>(a.out + i, x, N);
        },
        [&](int64_t i) { a.out[i] = one(a.x[i], a.grad[i]); });
  }
  reduce<kBlock>(sum, share, pieces.group, block_shared<Sums<2>>(),
                 [&](int n, double total) { partial[n * pieces.count + share.piece] = total; });
}

}  // namespace

template <class T, class C, class Z>
void fake_quantize(const FakeQuantizeArgs<T, C, Z>& args, void* stream) {
  if (args.shape.elements() == 0) return;
  const auto a = operands<T, C, Z>(args, nullptr, args.y);
  const bool wide = aligned(args.x) && aligned(args.y);
  const auto run_it = wide ? run<false, true, T, C, Z> : run<false, false, T, C, Z>;
  run_it("fake_quantize", a, args.shape.outer, stream);
}

template <class T, class C, class Z>
void fake_quantize_backward(const FakeQuantizeBackwardArgs<T, C, Z>& args, void* stream) {
  const Shape3& shape = args.forward.shape;
  if (shape.elements() == 0) return;
  const auto a = operands<T, C, Z>(args.forward, args.grad, args.grad_x);
  const bool wide = aligned(args.forward.x) && aligned(args.grad) && aligned(args.grad_x);
  if (!args.partial) {
    const auto run_it = wide ? run<true, true, T, C, Z> : run<true, false, T, C, Z>;
    run_it("fake_quantize_backward", a, shape.outer, stream);
    return;
  }
  const Pieces pieces = pieces_of<T>(shape);
  const bool block = pieces.group == kThreads;
  const auto kernel = block ? (wide ? gradient_sums<true, true, T, C, Z> : gradient_sums<true, false, T, C, Z>)
                            : (wide ? gradient_sums<false, true, T, C, Z> : gradient_sums<false, false, T, C, Z>);
  launch("fake_quantize_backward", kernel, blocks_of(pieces), sizeof(Sums<2>), stream, a, pieces, args.partial);
}

#define SMPQ_INSTANTIATE(T, C, Z)                                                \
  template void fake_quantize<T, C, Z>(const FakeQuantizeArgs<T, C, Z>&, void*); \
  template void fake_quantize_backward<T, C, Z>(const FakeQuantizeBackwardArgs<T, C, Z>&, void*);
SMPQ_FOR_EACH_TYPE(SMPQ_INSTANTIATE)
#undef SMPQ_INSTANTIATE

}  // namespace cuda
}  // namespace smpq
