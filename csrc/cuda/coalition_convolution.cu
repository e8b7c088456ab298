// coalition_convolution: an implicit matrix product on tensor cores, all rows in one launch. A warp takes 16 pixels of
// a row and up to 64 output channels; a fragment's word is four codes, two fixed-point numbers or a float of one pixel
// and tap, which lie side by side in memory, and so do the weights that they meet: nothing goes through shared memory.
// Sums of whole numbers are exact, so that the result is that of the CPU bit for bit; statistics are those of products
// rounded to float32.
#include "epilogue.cuh"

namespace smpq {
namespace cuda {
namespace {

template <class X>
using Args = ConvolutionArgs<X>;

// The fragments as PTX lays them out, all forms alike: of a[16 x 8 words] a lane holds rows lane / 4 and that + 8,
// words lane % 4 and that + 4; of b[8 words x 8] words lane % 4 and that + 4, column lane / 4; of the sums columns 2 *
// (lane % 4) and the next.
#define SMPQ_MMA(form, kind, sum, a, b)                                                           \
  asm("mma.sync.aligned." form " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+" kind(sum[0]), "+" kind(sum[1]), "+" kind(sum[2]), "+" kind(sum[3])                    \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

// sum += a * b, a word being four integers of a byte, signed or not. Sums wrap.
template <class A, class B>
__device__ __forceinline__ void multiply_bytes(int32_t (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  if constexpr (std::is_signed_v<A> && std::is_signed_v<B>) {
    SMPQ_MMA("m16n8k32.row.col.s32.s8.s8.s32", "r", sum, a, b);
  } else if constexpr (std::is_signed_v<A>) {
    SMPQ_MMA("m16n8k32.row.col.s32.s8.u8.s32", "r", sum, a, b);
  } else if constexpr (std::is_signed_v<B>) {
    SMPQ_MMA("m16n8k32.row.col.s32.u8.s8.s32", "r", sum, a, b);
  } else {
    SMPQ_MMA("m16n8k32.row.col.s32.u8.u8.s32", "r", sum, a, b);
  }
#else
  cuda_emulator::mma_m16n8k32<A, B>(sum, a, b);
#endif
}

// sum += a * b, a word being a float of which the first 10 bits behind the point count.
__device__ __forceinline__ void multiply_floats(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  SMPQ_MMA("m16n8k8.row.col.f32.tf32.tf32.f32", "f", sum, a, b);
#else
  cuda_emulator::mma_m16n8k8_tf32(sum, a, b);
#endif
}

__device__ __forceinline__ uint32_t word_of(float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  return word;
}

// The products of 16 pixels and 8 channels that a warp adds up, `loads` times eight words in one step.
template <class X>
struct Tile;

template <>
struct Tile<uint8_t> {
  static constexpr int loads = 1, blocks = 4;  // blocks of 16 channels that fit into a thread's registers
  int32_t sum[4] = {};

  __device__ __forceinline__ void add(const uint32_t (&x)[1][4], const uint32_t (&w)[1][2]) {
    multiply_bytes<uint8_t, int8_t>(sum, x[0], w[0]);
  }
  __device__ __forceinline__ int32_t total(int k) const { return sum[k]; }
};

// A number of 16 bits is 256 times its upper byte, signed, and its lower one: four products of bytes, exact.
template <>
struct Tile<int16_t> {
  static constexpr int loads = 2, blocks = 2;
  int32_t low[4] = {}, middle[4] = {}, high[4] = {};

  // Of two words with two numbers each, the lower bytes, or the upper ones.
  template <int n>
  static __device__ __forceinline__ void split(const uint32_t (&words)[2][n], uint32_t (&lower)[n],
                                               uint32_t (&upper)[n]) {
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const uint32_t first = words[0][k], second = words[1][k];
      lower[k] = (first & 0xff) | (first >> 8 & 0xff00) | (second & 0xff) << 16 | (second << 8 & 0xff000000u);
      upper[k] = (first >> 8 & 0xff) | (first >> 16 & 0xff00) | (second << 8 & 0xff0000) | (second & 0xff000000u);
    }
  }
  __device__ __forceinline__ void add(const uint32_t (&x)[2][4], const uint32_t (&w)[2][2]) {
    uint32_t x_low[4], x_high[4], w_low[2], w_high[2];
    split(x, x_low, x_high);
    split(w, w_low, w_high);
    multiply_bytes<uint8_t, uint8_t>(low, x_low, w_low);
    multiply_bytes<uint8_t, int8_t>(middle, x_low, w_high);
    multiply_bytes<int8_t, uint8_t>(middle, x_high, w_low);
    multiply_bytes<int8_t, int8_t>(high, x_high, w_high);
  }
  __device__ __forceinline__ int32_t total(int k) const {
    return static_cast<int32_t>(static_cast<uint32_t>(low[k]) + (static_cast<uint32_t>(middle[k]) << 8) +
                                (static_cast<uint32_t>(high[k]) << 16));
  }
};

// A float is one of 11 bits and one of the next 11; the product of the latter is beyond float32. Tensor cores cut off
// what they add: so three products at a time, and sums that round. Infinity gives NaN where it meets 0, as its second
// half does.
template <>
struct Tile<float> {
  static constexpr int loads = 1, blocks = 4;
  float sum[4] = {};

  static __device__ __forceinline__ float as_float(uint32_t word) {
    float value;
    memcpy(&value, &word, 4);
    return value;
  }
  static __device__ __forceinline__ uint32_t shortened(float value) {
    uint32_t word = word_of(value);
    if ((word & 0x7fffffffu) < 0x7f7ff000u) word += 0x1000u;  // else to infinity, or from NaN to a number
    return word & 0xffffe000u;
  }
  template <int n>
  static __device__ __forceinline__ void split(const uint32_t (&words)[n], uint32_t (&large)[n], uint32_t (&small)[n]) {
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const float value = as_float(words[k]);
      large[k] = shortened(value);
      small[k] = shortened(value - as_float(large[k]));
    }
  }
  __device__ __forceinline__ void add(const uint32_t (&x)[1][4], const uint32_t (&w)[1][2]) {
    uint32_t x_large[4], x_small[4], w_large[2], w_small[2];
    split(x[0], x_large, x_small);
    split(w[0], w_large, w_small);
    float part[4] = {};
    multiply_floats(part, x_small, w_large);
    multiply_floats(part, x_large, w_small);
    multiply_floats(part, x_large, w_large);
#pragma unroll
    for (int k = 0; k < 4; ++k) sum[k] += part[k];
  }
  __device__ __forceinline__ float total(int k) const { return sum[k]; }
};

// Where a pixel is.
template <class X>
struct Pixel {
  const X* image;
  int64_t y, x;  // of the first tap
  bool there;
};

template <class X>
__device__ __forceinline__ Pixel<X> pixel_at(const Args<X>& a, int64_t parent, int64_t pixel) {
  const int64_t plane = a.out_height * a.out_width, sample = pixel / plane, rest = pixel % plane;
  Pixel<X> p;
  p.there = sample < a.samples;
  p.image = a.x + (parent * a.samples + (p.there ? sample : 0)) * a.height * a.width * a.channels;
  p.y = rest / a.out_width * a.stride[0] - a.before[0];
  p.x = rest % a.out_width * a.stride[1] - a.before[1];
  return p;
}

// Walks over words of a group's channels, tap by tap.
template <class X>
struct Walk {
  static constexpr int together = Multiplied<X>::together;

  int64_t word, words, tap_y, tap_x, index;

  __device__ __forceinline__ Walk(const Args<X>& a, int64_t first)
      : word(0), words(a.depth / together), tap_y(0), tap_x(0), index(0) {
    advance(a, first);
  }
  __device__ __forceinline__ void advance(const Args<X>& a, int64_t by) {
    index += by;
    for (word += by; word >= words; word -= words) {
      if (++tap_x == a.kernel[1]) {
        tap_x = 0;
        ++tap_y;
      }
    }
  }
  __device__ __forceinline__ uint32_t at(const Args<X>& a, const Pixel<X>& p, uint32_t padding) const {
    if (!p.there || tap_y >= a.kernel[0]) return 0;
    const int64_t y = p.y + tap_y * a.dilation[0], x = p.x + tap_x * a.dilation[1];
    if (y < 0 || y >= a.height || x < 0 || x >= a.width) return padding;
    return *reinterpret_cast<const uint32_t*>(p.image + (y * a.width + x) * a.channels + word * together);
  }
};

// What stands for 0, in every channel of a word.
template <class X>
__device__ __forceinline__ uint32_t padding_word(X padding) {
  if constexpr (std::is_same_v<X, float>) {
    return word_of(padding);
  } else if constexpr (std::is_same_v<X, int16_t>) {
    return static_cast<uint16_t>(padding) * 0x00010001u;
  } else {
    return padding * 0x01010101u;
  }
}

// The products as they are, or the epilogue.
template <class X, class Sum>
__device__ __forceinline__ void put(const Args<X>& a, int64_t row, int64_t pixel, int64_t channel, Sum first,
                                    Sum second) {
  const Epilogue& e = a.epilogue;
  if (pixel >= e.pixels || channel >= e.code_channels) return;
  const Sum* start = a.start + row * a.outs * 16 + channel;
  const float product[2] = {static_cast<float>(first + start[0]), static_cast<float>(second + start[1])};
  if (a.products) {
    float* to = a.products + ((row - a.first_row) * e.pixels + pixel) * e.channels + channel;
    for (int k = 0; k < 2 && channel + k < e.channels; ++k) to[k] = product[k];
    return;
  }
  float y[2] = {};
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    if (channel + k >= e.channels) continue;
    y[k] = product[k] * e.scale[row * e.channels + channel + k] + e.bias[row * e.channels + channel + k];
  }
  finish(e, row, pixel, channel, y[0], y[1]);
}

constexpr int kPixels = 16 * kWarps;  // of a thread block

template <class X, int blocks>
__global__ void __launch_bounds__(kThreads) multiply(const Args<X> a, int64_t tiles, int64_t groups) {
  constexpr int loads = Tile<X>::loads;
  const int64_t tile = blockIdx.x % tiles, group = blockIdx.x / tiles % groups;
  const int64_t row = a.first_row + blockIdx.x / tiles / groups, parent = a.parent[row];
  const int lane = threadIdx.x % kWarp;
  const int64_t pixel = tile * kPixels + threadIdx.x / kWarp * 16 + lane / 4;
  Pixel<X> upper = pixel_at(a, parent, pixel), lower = pixel_at(a, parent, pixel + 8);
  const uint32_t padding = padding_word(a.padding[parent]);
  const int64_t words = a.kernel[0] * a.kernel[1] * (a.depth / Multiplied<X>::together);
  const int64_t block = group * blocks, seen = block / a.group_outs * a.depth;  // the first channel of its group
  upper.image += seen;
  lower.image += seen;
  const auto* weight = reinterpret_cast<const uint32_t*>(a.weight) + (a.variant[row] * a.outs + block) * words * 16;
  Tile<X> sum[blocks * 2];
  Walk<X> near(a, lane % 4), far(a, lane % 4 + 4);
  for (int64_t k = 0; k < words; k += 8 * loads) {
    uint32_t x[loads][4];
    int64_t index[loads][2];
#pragma unroll
    for (int load = 0; load < loads; ++load) {
      x[load][0] = near.at(a, upper, padding);
      x[load][1] = near.at(a, lower, padding);
      x[load][2] = far.at(a, upper, padding);
      x[load][3] = far.at(a, lower, padding);
      index[load][0] = near.index;
      index[load][1] = far.index;
      near.advance(a, 8);
      far.advance(a, 8);
    }
#pragma unroll
    for (int n = 0; n < blocks * 2; ++n) {
      uint32_t w[loads][2] = {};
      if (block + n / 2 < a.outs) {
        const uint32_t* from = weight + n / 2 * words * 16 + n % 2 * 8 + lane / 4;
#pragma unroll
        for (int load = 0; load < loads; ++load) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if (index[load][half] < words) w[load][half] = from[index[load][half] * 16];
          }
        }
      }
      sum[n].add(x, w);
    }
  }
#pragma unroll
  for (int n = 0; n < blocks * 2; ++n) {
    const int64_t channel = block * 16 + n * 8 + lane % 4 * 2;
    put(a, row, pixel, channel, sum[n].total(0), sum[n].total(1));
    put(a, row, pixel + 8, channel, sum[n].total(2), sum[n].total(3));
  }
}

// One product per channel and tap; a thread for two channels of a pixel.
template <class X>
__global__ void __launch_bounds__(kThreads) multiply_depthwise(const Args<X> a, int64_t pairs, int64_t count) {
  const int64_t id = thread_id();
  if (id >= count) return;
  const Epilogue& e = a.epilogue;
  const int64_t channel = id % pairs * 2, pixel = id / pairs % e.pixels, row = a.first_row + id / pairs / e.pixels;
  const int64_t parent = a.parent[row], taps = a.kernel[0] * a.kernel[1];
  const Pixel<X> p = pixel_at(a, parent, pixel);
  const auto* weight = a.weight + (a.variant[row] * a.outs + channel / 16) * taps * 16 + channel % 16;
  typename Args<X>::Sum sum[2] = {};
  for (int64_t ky = 0; ky < a.kernel[0]; ++ky) {
    for (int64_t kx = 0; kx < a.kernel[1]; ++kx, weight += 16) {
      const int64_t y = p.y + ky * a.dilation[0], x = p.x + kx * a.dilation[1];
      const bool inside = y >= 0 && y < a.height && x >= 0 && x < a.width;
      const X* values = p.image + (y * a.width + x) * a.channels + channel;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (channel + k < a.channels) sum[k] += (inside ? values[k] : a.padding[parent]) * weight[k];
      }
    }
  }
  put(a, row, pixel, channel, sum[0], sum[1]);
}

}  // namespace

template <class X>
void coalition_convolution(const Args<X>& a, int64_t last_row, void* stream) {
  const int64_t rows = last_row - a.first_row;
  if (rows == 0 || a.epilogue.pixels == 0) return;
  if (a.depthwise) {
    const int64_t pairs = a.epilogue.code_channels / 2, count = rows * a.epilogue.pixels * pairs;
    return launch("coalition_convolution", multiply_depthwise<X>, blocks_for(count), 0, stream, a, pairs, count);
  }
  const int64_t tiles = (a.epilogue.pixels + kPixels - 1) / kPixels;
  const int64_t own = a.group_outs;
  const bool one = own == a.outs;  // then the last warps may have fewer blocks
  int64_t together = (one ? own >= 4 : own % 4 == 0) ? 4 : (one ? own >= 2 : own % 2 == 0) ? 2 : 1;
  together = together < Tile<X>::blocks ? together : Tile<X>::blocks;
  const int64_t groups = (a.outs + together - 1) / together;
  const auto kernel = together == 4 ? multiply<X, Tile<X>::blocks> : together == 2 ? multiply<X, 2> : multiply<X, 1>;
  launch("coalition_convolution", kernel, rows * tiles * groups, 0, stream, a, tiles, groups);
}

template void coalition_convolution(const Args<uint8_t>&, int64_t, void*);
template void coalition_convolution(const Args<int16_t>&, int64_t, void*);
template void coalition_convolution(const Args<float>&, int64_t, void*);

}  // namespace cuda
}  // namespace smpq
