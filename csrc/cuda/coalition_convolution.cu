// coalition_convolution of codes: an implicit matrix product on int8 tensor cores, all rows in one launch. A warp takes
// 16 pixels of a row and up to 64 output channels; a fragment's word is four codes of one pixel and tap, which lie side
// by side in memory, and so do the four weights that they meet: nothing goes through shared memory. The sums are exact,
// so that the result is that of the CPU bit for bit; statistics are those of products rounded to float32.
#include "epilogue.cuh"

namespace smpq {
namespace cuda {
namespace {

using Args = ConvolutionArgs<uint8_t>;

// sum[16 x 8] += a[16 x 32] * b[32 x 8], u8 times s8, the fragments as PTX lays them out for mma.m16n8k32: a lane holds
// rows lane / 4 and that + 8, the words lane % 4 and that + 4 of a; word lane % 4 and that + 4, column lane / 4 of b;
// and columns 2 * (lane % 4) and the next of sum.
__device__ __forceinline__ void multiply_add(int32_t (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  cuda_emulator::mma_m16n8k32(sum, a, b);
#endif
}

// Where a pixel's codes are.
struct Pixel {
  const uint8_t* image;
  int64_t y, x;  // of the first tap
  bool there;
};

__device__ __forceinline__ Pixel pixel_at(const Args& a, int64_t parent, int64_t pixel) {
  const int64_t plane = a.out_height * a.out_width, sample = pixel / plane, rest = pixel % plane;
  Pixel p;
  p.there = sample < a.samples;
  p.image = a.x + (parent * a.samples + (p.there ? sample : 0)) * a.height * a.width * a.channels;
  p.y = rest / a.out_width * a.stride[0] - a.before[0];
  p.x = rest % a.out_width * a.stride[1] - a.before[1];
  return p;
}

// Walks over words of four channels of a group, tap by tap.
struct Walk {
  int64_t word, words, tap_y, tap_x, index;

  __device__ __forceinline__ Walk(const Args& a, int64_t first)
      : word(0), words(a.depth / 4), tap_y(0), tap_x(0), index(0) {
    advance(a, first);
  }
  __device__ __forceinline__ void advance(const Args& a, int64_t by) {
    index += by;
    for (word += by; word >= words; word -= words) {
      if (++tap_x == a.kernel[1]) {
        tap_x = 0;
        ++tap_y;
      }
    }
  }
  __device__ __forceinline__ uint32_t codes(const Args& a, const Pixel& p, uint32_t padding) const {
    if (!p.there || tap_y >= a.kernel[0]) return 0;
    const int64_t y = p.y + tap_y * a.dilation[0], x = p.x + tap_x * a.dilation[1];
    if (y < 0 || y >= a.height || x < 0 || x >= a.width) return padding;
    return *reinterpret_cast<const uint32_t*>(p.image + (y * a.width + x) * a.channels + word * 4);
  }
};

// The products as they are, or the epilogue.
__device__ __forceinline__ void put(const Args& a, int64_t row, int64_t pixel, int64_t channel, int32_t first,
                                    int32_t second) {
  const Epilogue& e = a.epilogue;
  if (pixel >= e.pixels || channel >= e.code_channels) return;
  const int32_t* start = a.start + row * a.outs * 16 + channel;
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

template <int blocks>
__global__ void __launch_bounds__(kThreads) multiply(const Args a, int64_t tiles, int64_t groups) {
  const int64_t tile = blockIdx.x % tiles, group = blockIdx.x / tiles % groups;
  const int64_t row = a.first_row + blockIdx.x / tiles / groups, parent = a.parent[row];
  const int lane = threadIdx.x % kWarp;
  const int64_t pixel = tile * kPixels + threadIdx.x / kWarp * 16 + lane / 4;
  Pixel upper = pixel_at(a, parent, pixel), lower = pixel_at(a, parent, pixel + 8);
  const uint32_t padding = a.padding[parent] * 0x01010101u;
  const int64_t words = a.kernel[0] * a.kernel[1] * (a.depth / 4);
  const int64_t block = group * blocks, seen = block / a.group_outs * a.depth;  // the first channel of its group
  upper.image += seen;
  lower.image += seen;
  const auto* weight = reinterpret_cast<const uint32_t*>(a.weight) + (a.variant[row] * a.outs + block) * words * 16;
  int32_t sum[blocks * 2][4] = {};
  Walk near(a, lane % 4), far(a, lane % 4 + 4);
  for (int64_t k = 0; k < words; k += 8) {
    const uint32_t x[4] = {near.codes(a, upper, padding), near.codes(a, lower, padding), far.codes(a, upper, padding),
                           far.codes(a, lower, padding)};
#pragma unroll
    for (int n = 0; n < blocks * 2; ++n) {
      uint32_t w[2] = {};
      if (block + n / 2 < a.outs) {
        const uint32_t* from = weight + n / 2 * words * 16 + n % 2 * 8 + lane / 4;
        if (near.index < words) w[0] = from[near.index * 16];
        if (far.index < words) w[1] = from[far.index * 16];
      }
      multiply_add(sum[n], x, w);
    }
    near.advance(a, 8);
    far.advance(a, 8);
  }
#pragma unroll
  for (int n = 0; n < blocks * 2; ++n) {
    const int64_t channel = block * 16 + n * 8 + lane % 4 * 2;
    put(a, row, pixel, channel, sum[n][0], sum[n][1]);
    put(a, row, pixel + 8, channel, sum[n][2], sum[n][3]);
  }
}

// One product per channel and tap; a thread for two channels of a pixel.
__global__ void __launch_bounds__(kThreads) multiply_depthwise(const Args a, int64_t pairs, int64_t count) {
  const int64_t id = thread_id();
  if (id >= count) return;
  const Epilogue& e = a.epilogue;
  const int64_t channel = id % pairs * 2, pixel = id / pairs % e.pixels, row = a.first_row + id / pairs / e.pixels;
  const int64_t parent = a.parent[row], taps = a.kernel[0] * a.kernel[1];
  const Pixel p = pixel_at(a, parent, pixel);
  const int8_t* weight = a.weight + (a.variant[row] * a.outs + channel / 16) * taps * 16 + channel % 16;
  int32_t sum[2] = {};
  for (int64_t ky = 0; ky < a.kernel[0]; ++ky) {
    for (int64_t kx = 0; kx < a.kernel[1]; ++kx, weight += 16) {
      const int64_t y = p.y + ky * a.dilation[0], x = p.x + kx * a.dilation[1];
      const bool inside = y >= 0 && y < a.height && x >= 0 && x < a.width;
      const uint8_t* codes = p.image + (y * a.width + x) * a.channels + channel;
#pragma unroll
      for (int k = 0; k < 2; ++k) sum[k] += (inside ? codes[k] : a.padding[parent]) * weight[k];
    }
  }
  put(a, row, pixel, channel, sum[0], sum[1]);
}

}  // namespace

void coalition_convolution(const ConvolutionArgs<uint8_t>& a, int64_t last_row, void* stream) {
  const int64_t rows = last_row - a.first_row;
  if (rows == 0 || a.epilogue.pixels == 0) return;
  if (a.depthwise) {
    const int64_t pairs = a.epilogue.code_channels / 2, count = rows * a.epilogue.pixels * pairs;
    return launch("coalition_convolution", multiply_depthwise, blocks_for(count), 0, stream, a, pairs, count);
  }
  const int64_t tiles = (a.epilogue.pixels + kPixels - 1) / kPixels;
  const int64_t own = a.group_outs;
  const bool one = own == a.outs;  // then the last warps may have fewer blocks
  const int64_t together = (one ? own >= 4 : own % 4 == 0) ? 4 : (one ? own >= 2 : own % 2 == 0) ? 2 : 1;
  const int64_t groups = (a.outs + together - 1) / together;
  const auto kernel = together == 4 ? multiply<4> : together == 2 ? multiply<2> : multiply<1>;
  launch("coalition_convolution", kernel, rows * tiles * groups, 0, stream, a, tiles, groups);
}

}  // namespace cuda
}  // namespace smpq
