// coalition_epilogue: one thread for two channels of a pixel. Before it: the children of every row, as linked lists, so
// that nothing is sorted and nobody waits; and, where rows are normalized by their own statistics, two short kernels,
// whose sums are added in an order that follows from the shape alone.
#include "epilogue.cuh"

namespace smpq {
namespace cuda {
namespace {

struct Lists {  // as many as a launch takes
  ChildList list[32];
  int64_t count;
};

// number: of the children in the lists of earlier launches.
__global__ void __launch_bounds__(kThreads)
    plan(const Lists lists, const Epilogue e, int64_t rows, int64_t number, int64_t* first, Child* children) {
  if (number == 0) {
    for (int64_t row = threadIdx.x; row < rows; row += kThreads) first[row] = -1;
    __syncthreads();
  }
  for (int64_t k = 0; k < lists.count; ++k) {
    const ChildList& list = lists.list[k];
    for (int64_t i = threadIdx.x; i < list.count; i += kThreads) {
      if (list.row[i] < 0 || list.row[i] >= rows) continue;
      Child child = child_of(list, i, e);
      auto* head = reinterpret_cast<unsigned long long*>(first + list.row[i]);
      child.next = static_cast<int64_t>(atomicExch(head, static_cast<unsigned long long>(number + i)));
      children[number + i] = child;
    }
    number += list.count;
  }
}

__global__ void __launch_bounds__(kThreads) moments_of(const EpilogueArgs a, int64_t parts, int64_t count, double* to) {
  const Epilogue& e = a.epilogue;
  const int64_t id = thread_id();
  if (id >= count) return;
  const int64_t channel = id % e.channels, part = id / e.channels % parts, row = a.first_row + id / e.channels / parts;
  const int64_t from = (a.parent ? a.parent[row] : row - a.first_row) * e.pixels;
  const int64_t end = (part + 1) * kMomentPixels < e.pixels ? (part + 1) * kMomentPixels : e.pixels;
  double sum = 0, square = 0;
  for (int64_t pixel = part * kMomentPixels; pixel < end; ++pixel) {
    const double x = static_cast<double>(a.values[(from + pixel) * e.channels + channel]);
    sum += x;
    square += x * x;
  }
  double* own = to + ((row - a.first_row) * parts + part) * 2 * e.channels + channel;
  own[0] = sum;
  own[e.channels] = square;
}

// A warp for each row and channel.
__global__ void __launch_bounds__(kThreads) normalize_kernel(const NormalizationArgs a, int64_t first_row,
                                                             int64_t count, const double* moments, int64_t parts) {
  const int64_t id = thread_id() / kWarp, lane = threadIdx.x % kWarp;
  const int64_t row = id / a.channels, channel = id % a.channels;
  double sum = 0, square = 0;
  if (id < count) {
    for (int64_t part = lane; part < parts; part += kWarp) {
      const double* from = moments + (row * parts + part) * 2 * a.channels + channel;
      sum += from[0];
      square += from[a.channels];
    }
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    sum += __shfl_down_sync(0xffffffffu, sum, step);
    square += __shfl_down_sync(0xffffffffu, square, step);
  }
  if (id < count && lane == 0) normalize(a, first_row + row, channel, sum, square);
}

__global__ void __launch_bounds__(kThreads) epilogue(const EpilogueArgs a, int64_t pairs, int64_t count) {
  const Epilogue& e = a.epilogue;
  const int64_t id = thread_id();
  if (id >= count) return;
  const int64_t channel = id % pairs * 2, pixel = id / pairs % e.pixels, row = a.first_row + id / pairs / e.pixels;
  const int64_t from = ((a.parent ? a.parent[row] : row - a.first_row) * e.pixels + pixel) * e.channels + channel;
  float y[2] = {};
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (channel + k >= e.channels) continue;
    y[k] = a.values[from + k];
    if (a.broken && y[k] != y[k]) a.broken[(row * e.pixels + pixel) / a.plane] = true;
    if (e.scale) y[k] = y[k] * e.scale[row * e.channels + channel + k] + e.bias[row * e.channels + channel + k];
  }
  finish(e, row, pixel, channel, y[0], y[1]);
}

}  // namespace

void plan_children(const ChildList* lists, int64_t count, const Epilogue& e, int64_t rows, int64_t* first,
                   Child* children, void* stream) {
  if (rows == 0) return;
  constexpr int64_t most = sizeof(Lists::list) / sizeof(ChildList);
  int64_t number = 0;
  for (int64_t k = 0; k == 0 || k < count; k += most) {
    Lists given{};
    given.count = count - k < most ? count - k : most;
    for (int64_t i = 0; i < given.count; ++i) given.list[i] = lists[k + i];
    launch("plan_children", plan, 1, 0, stream, given, e, rows, number, first, children);
    for (int64_t i = 0; i < given.count; ++i) number += given.list[i].count;
  }
}

void coalition_moments(const EpilogueArgs& a, int64_t last_row, double* moments, void* stream) {
  const int64_t parts = moment_parts(a.epilogue), count = (last_row - a.first_row) * parts * a.epilogue.channels;
  launch("coalition_moments", moments_of, blocks_for(count), 0, stream, a, parts, count, moments);
}

void normalize_rows(const NormalizationArgs& a, int64_t first_row, int64_t last_row, const double* moments,
                    int64_t parts, void* stream) {
  const int64_t count = (last_row - first_row) * a.channels;
  launch("normalize_rows", normalize_kernel, blocks_for(count * kWarp), 0, stream, a, first_row, count, moments, parts);
}

void coalition_epilogue(const EpilogueArgs& a, int64_t last_row, void* stream) {
  const int64_t pairs = a.epilogue.code_channels / 2, count = (last_row - a.first_row) * a.epilogue.pixels * pairs;
  launch("coalition_epilogue", epilogue, blocks_for(count), 0, stream, a, pairs, count);
}

}  // namespace cuda
}  // namespace smpq
