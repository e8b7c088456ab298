// Deterministic sums over the pieces of kernels.h: who reads which element, and in which order the sums are added,
// follow from the shape and the alignment of the pointers alone. No atomics.
#pragma once

#include "launch.cuh"

namespace smpq {
namespace cuda {

struct Pieces {
  Shape3 shape;
  int64_t per_run, count;
  int group;  // threads that share a piece: a power of two up to a warp, or the whole block
};

template <class T>
Pieces pieces_of(const Shape3& shape) {
  Pieces p{shape, pieces_per_run(shape), piece_count(shape), 1};
  const int64_t longest = shape.inner < kPiece ? shape.inner : kPiece;
  if (longest > kPiece / 4) {
    p.group = kThreads;
  } else {
    while (p.group < kWarp && p.group * kLanes<T> < longest) p.group *= 2;
  }
  return p;
}

inline int64_t blocks_of(const Pieces& p) {
  const int64_t per_block = kThreads / p.group;
  return (p.count + per_block - 1) / per_block;
}

// The part of one thread in a piece.
struct Share {
  int64_t piece, begin, channel;
  int length, lane;
};

template <bool kBlock>
__device__ __forceinline__ Share share_of(const Pieces& p) {
  const int thread = static_cast<int>(threadIdx.x);
  Share s;
  if constexpr (kBlock) {
    s.piece = blockIdx.x;
    s.lane = thread;
  } else {
    s.piece = static_cast<int64_t>(blockIdx.x) * (kThreads / p.group) + thread / p.group;
    s.lane = thread % p.group;
  }
  if (s.piece >= p.count) {  // still takes part in the shuffles, with nothing
    s.begin = s.channel = 0;
    s.length = 0;
    return s;
  }
  const int64_t run = s.piece / p.per_run;
  const int64_t offset = (s.piece - run * p.per_run) * kPiece;
  const int64_t left = p.shape.inner - offset;
  s.begin = run * p.shape.inner + offset;
  s.channel = run % p.shape.channels;
  s.length = static_cast<int>(left < kPiece ? left : kPiece);
  return s;
}

// Calls scalar(i) and, for N neighbours that start on a multiple of N, wide(i) for this thread's elements.
template <bool kBlock, int N, class Wide, class Scalar>
__device__ __forceinline__ void for_share(const Share& s, int group, Wide wide, Scalar scalar) {
  if constexpr (kBlock) group = kThreads;
  const int misfit = static_cast<int>((N - s.begin % N) % N);
  const int head = misfit < s.length ? misfit : s.length;
  const int packs = (s.length - head) / N;
  for (int p = s.lane; p < packs; p += group) wide(s.begin + head + p * N);
  const int loose = s.length - packs * N;
  for (int i = s.lane; i < loose; i += group) scalar(s.begin + (i < head ? i : i + packs * N));
}

template <int N>
struct Sums {
  double of_warp[kWarps][N];
};

// Adds up the sums of a group's threads, in a fixed tree, and calls write(n, total) once for each n. The whole block
// calls it.
template <bool kBlock, int N, class Write>
__device__ __forceinline__ void reduce(double (&sum)[N], const Share& s, int group, Sums<N>& shared, Write write) {
  if constexpr (kBlock) group = kWarp;
  for (int offset = group / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int n = 0; n < N; ++n) sum[n] += __shfl_xor_sync(0xffffffffu, sum[n], offset);
  }
  if constexpr (kBlock) {
    const int warp = s.lane / kWarp;
    if (s.lane % kWarp == 0) {
#pragma unroll
      for (int n = 0; n < N; ++n) shared.of_warp[warp][n] = sum[n];
    }
    __syncthreads();
    if (s.lane < N) {
      double total = shared.of_warp[0][s.lane];
      for (int w = 1; w < kWarps; ++w) total += shared.of_warp[w][s.lane];
      write(s.lane, total);
    }
    __syncthreads();  // the next call writes the same memory
  } else if (s.lane == 0 && s.length > 0) {
#pragma unroll
    for (int n = 0; n < N; ++n) write(n, sum[n]);
  }
}

}  // namespace cuda
}  // namespace smpq
