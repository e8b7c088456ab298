// coalition_fake_quantize: n rows from each element, for a list of tensors, in one launch.
//
// A block owns a tile of elements and up to kRows rows, so that small tensors with many rows still fill the device. Its
// threads walk down the rows. As long as the parent stays the same (always, without `parent`; mostly, when the rows are
// sorted), an element is read once, and each candidate's value is computed once, when a row first asks for it. The
// values wait in shared memory and not in registers: a row picks its candidate by a run-time index, which would spill a
// register array. Each thread reads back only what it wrote, so this needs no barrier. One-hot rows cost one 16-byte
// shared load per 4 elements; the next parent's elements are on their way while the present row is added up.
//
// Neighbouring blocks take the same tile and the next rows: what parents they share they find in L2.
#include <vector>

#include "launch.cuh"

namespace smpq {
namespace cuda {
namespace {

constexpr int kRows = 32;    // of a block
constexpr int kStaged = 32;  // candidates whose weights and grids are staged, one bit of a word each
constexpr int kCached = 8;   // candidates whose values are kept
template <class C>
constexpr int kWidth = static_cast<int>(16 / sizeof(C));  // elements of a thread: 16 bytes when computed with
template <class C>
constexpr int kTile = kThreads * kWidth<C>;

template <class C>
struct Staged {
  C weight[kRows][kStaged];
  Grid<C> grid[kStaged];  // of tensors with one grid per candidate
  int64_t parent[kRows];
  uint32_t used[kRows];  // the candidates with a non-zero weight
};
template <class C>
using Value = Pack<C, kWidth<C>>;
template <class C>
struct Shared {
  alignas(16) Staged<C> staged;
  Value<C> value[kCached][kThreads];
};
template <class C>
int64_t shared_bytes(int64_t candidates) {
  const int64_t cached = candidates < kCached ? candidates : kCached;
  return static_cast<int64_t>(sizeof(Shared<C>)) -
         (kCached - cached) * static_cast<int64_t>(sizeof(Value<C>)) * kThreads;
}

// A tensor and what the host knows about it.
template <class T, class C, class Z>
struct Tensor {
  CoalitionArgs<T, C, Z> args;
  int64_t elements;
  bool wide;  // each row starts at a multiple of kWidth elements
};

// Passed by value: no copy to the device and nothing to keep alive.
template <class T, class C, class Z, int kBytes>
struct Table {
  static constexpr int kCapacity = (kBytes - 16) / static_cast<int>(sizeof(Tensor<T, C, Z>) + sizeof(uint32_t));
  Tensor<T, C, Z> tensor[kCapacity];
  uint32_t first_block[kCapacity + 1];
  int32_t count;
};
constexpr int kSmallTable = 4096;
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int kLargeTable = 4096;
#else
constexpr int kLargeTable = 32764;  // kernel parameters up to here since CUDA 12.1, on sm_70 and later
#endif

// The elements of one thread: neighbours if rows are aligned, else kThreads apart, which is as well coalesced.
template <class T, class C, class Z>
struct Elements {
  static constexpr int N = kWidth<C>;
  const Tensor<T, C, Z>& tensor;
  int64_t first;
  int step;
  bool one_channel;

  __device__ __forceinline__ Elements(const Tensor<T, C, Z>& t, int64_t tile) : tensor(t) {
    first = tile * kTile<C> + static_cast<int64_t>(threadIdx.x) * (t.wide ? N : 1);
    step = t.wide ? 1 : kThreads;
    one_channel = !t.args.per_channel || first / t.args.shape.inner == (first + (N - 1) * step) / t.args.shape.inner;
  }
  __device__ __forceinline__ int64_t at(int k) const { return first + k * step; }

  __device__ __forceinline__ Pack<T, N> load(int64_t parent) const {
    if (parent < 0) return Pack<T, N>{};
    const T* x = tensor.args.x + parent * tensor.elements;
    if (tensor.wide) return load_pack<N>(x + first, tensor.elements - first);
    Pack<T, N> pack{};
#pragma unroll
    for (int k = 0; k < N; ++k)
      if (at(k) < tensor.elements) pack.item[k] = x[at(k)];
    return pack;
  }
  __device__ __forceinline__ void store(int64_t row, const Pack<T, N>& pack) const {
    T* y = tensor.args.y + row * tensor.elements;
    if (tensor.wide) {
      store_pack<N>(y + first, pack, tensor.elements - first);
      return;
    }
#pragma unroll
    for (int k = 0; k < N; ++k)
      if (at(k) < tensor.elements) y[at(k)] = pack.item[k];
  }

  __device__ __forceinline__ Grid<C> grid(int64_t candidate, int k) const {
    const CoalitionArgs<T, C, Z>& a = tensor.args;
    int64_t index = candidate;
    if (a.per_channel) {
      const int64_t element = at(k) < tensor.elements ? at(k) : tensor.elements - 1;
      index = candidate * a.shape.channels + element / a.shape.inner % a.shape.channels;
    }
    return grid_at(a.scale, a.zero_point, index, a.quant_min[candidate], a.quant_max[candidate]);
  }
};

template <class T, class C, class Z, int kBytes>
__global__ void __launch_bounds__(kThreads) coalition(const __grid_constant__ Table<T, C, Z, kBytes> table) {
  constexpr int N = kWidth<C>;
  int low = 0, high = table.count;  // first_block[low] <= blockIdx.x < first_block[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.first_block[middle] <= blockIdx.x ? low : high) = middle;
  }
  const Tensor<T, C, Z>& tensor = table.tensor[low];
  const CoalitionArgs<T, C, Z>& a = tensor.args;
  const uint32_t block = blockIdx.x - table.first_block[low];
  const uint32_t row_blocks = static_cast<uint32_t>((a.rows + kRows - 1) / kRows);
  const int64_t first_row = static_cast<int64_t>(block % row_blocks) * kRows;
  const int rows = static_cast<int>(a.rows - first_row < kRows ? a.rows - first_row : kRows);
  const int candidates = static_cast<int>(a.candidates);

  Shared<C>& shared = block_shared<Shared<C>>();
  Staged<C>& staged = shared.staged;
  const int thread = static_cast<int>(threadIdx.x);
  for (int r = thread / kWarp; r < rows; r += kWarps) {  // a warp stages a row, a lane a candidate
    const int lane = thread % kWarp;
    const C weight = lane < candidates ? a.mixtures[(first_row + r) * a.candidates + lane] : C(0);
    const uint32_t used = __ballot_sync(0xffffffffu, weight != C(0));
    staged.weight[r][lane] = weight;
    if (lane == 0) {
      staged.used[r] = used;
      // A parent that x does not hold gives NaN: on the host that would be an error, at the price of waiting for the
      // device.
      const int64_t parent = a.parent ? a.parent[first_row + r] : 0;
      staged.parent[r] = parent >= 0 && parent < a.parents ? parent : -1;
    }
  }
  if (!a.per_channel && thread < kStaged && thread < candidates)
    staged.grid[thread] = grid_at(a.scale, a.zero_point, thread, a.quant_min[thread], a.quant_max[thread]);
  __syncthreads();

  const Elements<T, C, Z> mine(tensor, block / row_blocks);
  if (mine.first >= tensor.elements) return;
  Pack<T, N> next = mine.load(staged.parent[0]);
  C x[N];
  uint32_t known = 0;  // candidates whose values wait in shared memory
  for (int r = 0; r < rows; ++r) {
    if (r == 0 || staged.parent[r] != staged.parent[r - 1]) {
#pragma unroll
      for (int k = 0; k < N; ++k) x[k] = to_compute(next.item[k]);
      known = 0;
    }
    if (r + 1 < rows && staged.parent[r + 1] != staged.parent[r]) next = mine.load(staged.parent[r + 1]);

    C sum[N];
#pragma unroll
    for (int k = 0; k < N; ++k) sum[k] = C(-0.0);  // adding to -0 changes nothing, not even the sign of a zero
    bool empty = true;
    const auto add = [&](int c, C weight) {
      Value<C> value;
      if (c < kCached && (known >> c & 1u)) {
        value = shared.value[c][thread];
      } else {
        Grid<C> grid = a.per_channel || c >= kStaged ? mine.grid(c, 0) : staged.grid[c];
#pragma unroll
        for (int k = 0; k < N; ++k) {
          if (k > 0 && !mine.one_channel) grid = mine.grid(c, k);
          value.item[k] = fake_quantize_one<Z>(x[k], grid);
        }
        if (c < kCached) {
          shared.value[c][thread] = value;
          known |= 1u << c;
        }
      }
#pragma unroll
      for (int k = 0; k < N; ++k) sum[k] += weight == C(1) ? value.item[k] : weight * value.item[k];
      empty = false;
    };
    for (uint32_t used = staged.used[r]; used != 0; used &= used - 1) {
      const int c = __ffs(static_cast<int>(used)) - 1;
      add(c, staged.weight[r][c]);
    }
    for (int c = kStaged; c < candidates; ++c) {
      const C weight = a.mixtures[(first_row + r) * a.candidates + c];
      if (weight != C(0)) add(c, weight);
    }

    Pack<T, N> out;
#pragma unroll
    for (int k = 0; k < N; ++k) out.item[k] = Convert<T>::from(staged.parent[r] < 0 ? C(NAN) : empty ? C(0) : sum[k]);
    mine.store(first_row + r, out);
  }
}

template <class T, class C, class Z, int kBytes>
void launch_tables(const std::vector<Tensor<T, C, Z>>& tensors, void* stream) {
  using TableT = Table<T, C, Z, kBytes>;
  static_assert(sizeof(TableT) <= kBytes, "a kernel's parameters must fit");
  TableT table;
  table.count = 0;
  int64_t blocks = 0, candidates = 0;
  const auto flush = [&] {
    table.first_block[table.count] = static_cast<uint32_t>(blocks);
    launch("coalition_fake_quantize", coalition<T, C, Z, kBytes>, blocks, shared_bytes<C>(candidates), stream, table);
    table.count = 0;
    blocks = candidates = 0;
  };
  for (const Tensor<T, C, Z>& t : tensors) {
    const int64_t tiles = (t.elements + kTile<C> - 1) / kTile<C>;
    const int64_t more = tiles * ((t.args.rows + kRows - 1) / kRows);
    if (table.count == TableT::kCapacity || (table.count > 0 && blocks + more > INT32_MAX)) flush();
    table.tensor[table.count] = t;
    table.first_block[table.count++] = static_cast<uint32_t>(blocks);
    blocks += more;
    candidates = candidates < t.args.candidates ? t.args.candidates : candidates;
  }
  flush();
}

}  // namespace

template <class T, class C, class Z>
void coalition_fake_quantize(const CoalitionArgs<T, C, Z>* tensors, int64_t count, void* stream) {
  std::vector<Tensor<T, C, Z>> todo;
  for (int64_t i = 0; i < count; ++i) {
    const CoalitionArgs<T, C, Z>& a = tensors[i];
    const int64_t elements = a.shape.elements();
    if (elements == 0 || a.rows == 0) continue;
    constexpr size_t kBytes = kWidth<C> * sizeof(T);
    todo.push_back({a, elements, aligned(a.x, kBytes) && aligned(a.y, kBytes) && elements % kWidth<C> == 0});
  }
  if (todo.empty()) return;
  const bool small = static_cast<int64_t>(todo.size()) <= Table<T, C, Z, kSmallTable>::kCapacity;
  small ? launch_tables<T, C, Z, kSmallTable>(todo, stream) : launch_tables<T, C, Z, kLargeTable>(todo, stream);
}

#define SMPQ_INSTANTIATE(T, C, Z) \
  template void coalition_fake_quantize<T, C, Z>(const CoalitionArgs<T, C, Z>*, int64_t, void*);
SMPQ_FOR_EACH_TYPE(SMPQ_INSTANTIATE)
#undef SMPQ_INSTANTIATE

}  // namespace cuda
}  // namespace smpq
