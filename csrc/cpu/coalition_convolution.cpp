// coalition_convolution on the CPU. Compiled once per instruction set, into the namespace SMPQ_ISA.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "buffer.h"
#include "epilogue.h"

namespace smpq::cpu::SMPQ_ISA {
namespace {

template <class X>
using Vector = std::conditional_t<std::is_same_v<X, float>, Floats, Ints>;  // of sums

// Where the pixels of one image are, its border filled in.
template <class X>
struct Image {
  const X* x;
  int64_t line;         // elements from one row of pixels to the next
  const int64_t* taps;  // offsets of the kernel's positions
  int64_t tap_count;
  const int64_t* runs;  // offsets of `run` times `together` channels, tap by tap
  int64_t run_count;
  int run;  // kRun, or 1 where the channels are no multiple of that
};

constexpr int kRun = 4;

// Calls f(offset, group) for every `together` channels of every tap: where they are in x, and in a block of weights.
template <int together, class X, class F>
SMPQ_INLINE void for_each_group(const Image<X>& image, F&& f) {
  const int64_t count = image.run_count;
  const int64_t* const runs = image.runs;
  if (image.run == kRun) {
    for (int64_t k = 0; k < count; ++k) {
#pragma GCC unroll 4
      for (int u = 0; u < kRun; ++u) f(runs[k] + u * together, k * kRun + u);
    }
  } else {
    for (int64_t k = 0; k < count; ++k) f(runs[k], k);
  }
}

// Products of `T` neighbouring output pixels and `blocks` x 16 output channels, kept in registers.
template <int T, int blocks>
SMPQ_INLINE void multiply(const ConvolutionArgs<uint8_t>& a, const uint8_t* x, int64_t step,
                          const Image<uint8_t>& image, const int8_t* weight, const int32_t* start,
                          Ints (&out)[T][blocks]) {
  const int64_t panel = image.tap_count * a.depth * kLanes;  // bytes of a block of channels
#if defined(__AVX512VNNI__)
  __m512i sum[T][blocks];
#pragma GCC unroll 4
  for (int o = 0; o < blocks; ++o) {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) sum[t][o] = _mm512_loadu_si512(start + o * kLanes);
  }
  for_each_group<4>(image, [&](int64_t offset, int64_t group) __attribute__((always_inline)) {
    __m512i w[blocks];
#pragma GCC unroll 4
    for (int o = 0; o < blocks; ++o) w[o] = _mm512_loadu_si512(weight + o * panel + group * 4 * kLanes);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      int32_t four;
      std::memcpy(&four, x + offset + t * step, 4);
      const __m512i codes = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int o = 0; o < blocks; ++o) sum[t][o] = _mm512_dpbusd_epi32(sum[t][o], codes, w[o]);
    }
  });
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
    for (int o = 0; o < blocks; ++o) out[t][o] = (Ints)sum[t][o];
  }
#else
  int32_t sum[T][blocks * kLanes];
  for (int t = 0; t < T; ++t) std::copy(start, start + blocks * kLanes, sum[t]);
  for (int64_t k = 0; k < image.tap_count; ++k) {
    const int64_t tap = image.taps[k];
    for (int64_t c = 0; c < a.depth; c += 4) {
      for (int t = 0; t < T; ++t) {
        const uint8_t* four = x + tap + t * step + c;
        for (int o = 0; o < blocks; ++o) {
          const int8_t* w = weight + o * panel;
          for (int lane = 0; lane < kLanes; ++lane) {
            sum[t][o * kLanes + lane] += four[0] * w[4 * lane] + four[1] * w[4 * lane + 1] + four[2] * w[4 * lane + 2] +
                                         four[3] * w[4 * lane + 3];
          }
        }
      }
      weight += 4 * kLanes;
    }
  }
  std::memcpy(out, sum, sizeof sum);
#endif
}

template <int T, int blocks>
SMPQ_INLINE void multiply(const ConvolutionArgs<float>& a, const float* x, int64_t step, const Image<float>& image,
                          const float* weight, const float* start, Floats (&out)[T][blocks]) {
  const int64_t panel = image.tap_count * a.depth * kLanes;
#if defined(__AVX512F__)
  __m512 sum[T][blocks];
#pragma GCC unroll 4
  for (int o = 0; o < blocks; ++o) {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) sum[t][o] = _mm512_loadu_ps(start + o * kLanes);
  }
  for_each_group<1>(image, [&](int64_t offset, int64_t group) __attribute__((always_inline)) {
    __m512 w[blocks];
#pragma GCC unroll 4
    for (int o = 0; o < blocks; ++o) w[o] = _mm512_loadu_ps(weight + o * panel + group * kLanes);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const __m512 value = _mm512_set1_ps(x[offset + t * step]);
#pragma GCC unroll 4
      for (int o = 0; o < blocks; ++o) sum[t][o] = _mm512_fmadd_ps(value, w[o], sum[t][o]);
    }
  });
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
    for (int o = 0; o < blocks; ++o) out[t][o] = (Floats)sum[t][o];
  }
#else
  Floats sum[T][blocks];
  for (int t = 0; t < T; ++t) {
    for (int o = 0; o < blocks; ++o) load(sum[t][o], start + o * kLanes);
  }
  for (int64_t k = 0; k < image.tap_count; ++k) {
    const float* pixel = x + image.taps[k];
    for (int64_t c = 0; c < a.depth; ++c, ++pixel, weight += kLanes) {
      for (int o = 0; o < blocks; ++o) {
        Floats w;
        load(w, weight + o * panel);
        for (int t = 0; t < T; ++t) sum[t][o] += pixel[t * step] * w;
      }
    }
  }
  std::memcpy(out, sum, sizeof sum);
#endif
}

template <int T, int blocks>
SMPQ_INLINE void multiply(const ConvolutionArgs<int16_t>& a, const int16_t* x, int64_t step,
                          const Image<int16_t>& image, const int16_t* weight, const int32_t* start,
                          Ints (&out)[T][blocks]) {
  const int64_t panel = image.tap_count * a.depth * kLanes;
#if defined(__AVX512VNNI__)
  __m512i sum[T][blocks];
#pragma GCC unroll 4
  for (int o = 0; o < blocks; ++o) {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) sum[t][o] = _mm512_loadu_si512(start + o * kLanes);
  }
  for_each_group<2>(image, [&](int64_t offset, int64_t group) __attribute__((always_inline)) {
    __m512i w[blocks];
#pragma GCC unroll 4
    for (int o = 0; o < blocks; ++o) w[o] = _mm512_loadu_si512(weight + o * panel + group * 2 * kLanes);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      int32_t two;
      std::memcpy(&two, x + offset + t * step, 4);
      const __m512i values = _mm512_set1_epi32(two);
#pragma GCC unroll 4
      for (int o = 0; o < blocks; ++o) sum[t][o] = _mm512_dpwssd_epi32(sum[t][o], values, w[o]);
    }
  });
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
    for (int o = 0; o < blocks; ++o) out[t][o] = (Ints)sum[t][o];
  }
#else
  int32_t sum[T][blocks * kLanes];
  for (int t = 0; t < T; ++t) std::copy(start, start + blocks * kLanes, sum[t]);
  for_each_group<2>(image, [&](int64_t offset, int64_t group) {
    for (int t = 0; t < T; ++t) {
      const int16_t* two = x + offset + t * step;
      for (int o = 0; o < blocks; ++o) {
        const int16_t* w = weight + o * panel + group * 2 * kLanes;
        for (int lane = 0; lane < kLanes; ++lane) {
          sum[t][o * kLanes + lane] += two[0] * w[2 * lane] + two[1] * w[2 * lane + 1];
        }
      }
    }
  });
  std::memcpy(out, sum, sizeof sum);
#endif
}

// One product per channel and tap.
template <int T>
SMPQ_INLINE void multiply_depthwise(const int16_t* x, int64_t step, const Image<int16_t>& image, const int16_t* weight,
                                    const int32_t* start, Ints (&out)[T][1]) {
  Ints sum[T];
  for (int t = 0; t < T; ++t) load(sum[t], start);
  for (int64_t k = 0; k < image.tap_count; ++k, weight += kLanes) {
    Shorts w, value;
    load(w, weight);
    const Ints wide = __builtin_convertvector(w, Ints);
    for (int t = 0; t < T; ++t) {
      load(value, x + image.taps[k] + t * step);
      sum[t] += __builtin_convertvector(value, Ints) * wide;
    }
  }
  std::memcpy(out, sum, sizeof sum);
}

template <int T>
SMPQ_INLINE void multiply_depthwise(const float* x, int64_t step, const Image<float>& image, const float* weight,
                                    const float* start, Floats (&out)[T][1]) {
  Floats sum[T];
  for (int t = 0; t < T; ++t) load(sum[t], start);
  for (int64_t k = 0; k < image.tap_count; ++k, weight += kLanes) {
    Floats w;
    load(w, weight);
    for (int t = 0; t < T; ++t) {
      Floats value;
      load(value, x + image.taps[k] + t * step);
      sum[t] += value * w;
    }
  }
  std::memcpy(out, sum, sizeof sum);
}

template <int T>
SMPQ_INLINE void multiply_depthwise(const uint8_t* x, int64_t step, const Image<uint8_t>& image, const int8_t* weight,
                                    const int32_t* start, Ints (&out)[T][1]) {
#if defined(__AVX512VNNI__)
  __m512i sum[T];
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) sum[t] = _mm512_loadu_si512(start);
  for (int64_t k = 0; k < image.tap_count; ++k, weight += kLanes) {
    const __m512i w = _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(weight)));
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const auto* codes = reinterpret_cast<const __m128i*>(x + image.taps[k] + t * step);
      // Pairs of 16 bits: the upper half of a code is 0, so the upper half of the weight does not matter.
      sum[t] = _mm512_dpwssd_epi32(sum[t], _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(codes)), w);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) out[t][0] = (Ints)sum[t];
#else
  int32_t sum[T][kLanes];
  for (int t = 0; t < T; ++t) std::copy(start, start + kLanes, sum[t]);
  for (int64_t k = 0; k < image.tap_count; ++k, weight += kLanes) {
    for (int t = 0; t < T; ++t) {
      const uint8_t* codes = x + image.taps[k] + t * step;
      for (int lane = 0; lane < kLanes; ++lane) sum[t][lane] += codes[lane] * weight[lane];
    }
  }
  std::memcpy(out, sum, sizeof sum);
#endif
}

// What an image of a row meets in the blocks of output channels that are computed together.
template <class X, int blocks>
struct Block {
  int64_t row, sample, first;  // channel
  const typename Multiplied<X>::Weight* weight;
  const typename Multiplied<X>::Sum* start;
  Floats scale[blocks], bias[blocks];
  Moments moments[blocks] = {};

  Block(const ConvolutionArgs<X>& a, int64_t row_, int64_t sample_, int64_t block, int64_t taps)
      : row(row_), sample(sample_), first(block * kLanes) {
    weight = a.weight + (a.variant[row] * a.outs + block) * taps * kLanes * (a.depthwise ? 1 : a.depth);
    start = a.start + row * a.outs * kLanes + first;
    if (a.products) return;
    const Epilogue& e = a.epilogue;
    for (int o = 0; o < blocks; ++o) {
      load_lanes<false>(scale[o], e.scale + row * e.channels + first + o * kLanes, lanes(e, o));
      load_lanes<false>(bias[o], e.bias + row * e.channels + first + o * kLanes, lanes(e, o));
    }
  }

  // Channels of block o that are there.
  int lanes(const Epilogue& e, int o) const {
    return static_cast<int>(std::min<int64_t>(kLanes, e.channels - first - o * kLanes));
  }

  void write_moments(const ConvolutionArgs<X>& a) const {
    const int64_t channels = a.epilogue.channels;
    double* to = a.moments + ((row - a.first_row) * a.samples + sample) * 2 * channels + first;
    for (int o = 0; o < blocks; ++o, to += kLanes) moments[o].store(to, to + channels, lanes(a.epilogue, o));
  }
};

// T pixels, from `pixel` on, of one block: the products as they are, and their moments.
template <int T, class X>
SMPQ_INLINE void keep(const ConvolutionArgs<X>& a, int64_t row, int64_t pixel, int64_t channel,
                      const Vector<X> (&products)[T], Moments& moments) {
  const int64_t channels = a.epilogue.channels, n = channels - channel;
  float* to = a.products + ((row - a.first_row) * a.epilogue.pixels + pixel) * channels + channel;
  Moments sums = moments;
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t) {
    sums.add(products[t]);
    const Floats rounded = __builtin_convertvector(products[t], Floats);
    n >= kLanes ? store_lanes<true>(to + t * channels, rounded, kLanes)
                : store_lanes<false>(to + t * channels, rounded, static_cast<int>(n));
  }
  moments = sums;
}

template <int T, class X, int blocks>
SMPQ_INLINE void tile(const ConvolutionArgs<X>& a, const Image<X>& image, Block<X, blocks>& b, int64_t oy, int64_t ox) {
  const int64_t step = a.stride[1] * a.channels;
  const X* x = image.x + oy * a.stride[0] * image.line + ox * step + (a.depthwise ? b.first : 0);
  Vector<X> products[T][blocks];
  const auto all = [&] { multiply<T, blocks>(a, x, step, image, b.weight, b.start, products); };
  if constexpr (blocks == 1) {
    a.depthwise ? multiply_depthwise<T>(x, step, image, b.weight, b.start, products) : all();
  } else {
    all();
  }
  const int64_t pixel = (b.sample * a.out_height + oy) * a.out_width + ox;
#pragma GCC unroll 4
  for (int o = 0; o < blocks; ++o) {
    Vector<X> own[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) own[t] = products[t][o];
    if (a.products) {
      keep<T>(a, b.row, pixel, b.first + o * kLanes, own, b.moments[o]);
      continue;
    }
    Floats y[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) y[t] = __builtin_convertvector(own[t], Floats) * b.scale[o] + b.bias[o];
    finish<T>(a.epilogue, b.row, pixel, b.first + o * kLanes, y);
  }
}

template <int T, class X, int blocks>
void line(const ConvolutionArgs<X>& a, const Image<X>& image, Block<X, blocks>& b, int64_t oy, int64_t ox) {
  for (; ox + T <= a.out_width; ox += T) tile<T>(a, image, b, oy, ox);
  if constexpr (T > 1) {
    if (ox < a.out_width) line<T / 2>(a, image, b, oy, ox);
  }
}

// Blocks up to `last`. The weights of a block stay in the nearest caches while all pixels pass by.
template <int blocks, int T, class X>
void channels(const ConvolutionArgs<X>& a, const Image<X>& image, int64_t row, int64_t sample, int64_t& block,
              int64_t last) {
  for (; block + blocks <= last; block += blocks) {
    Block<X, blocks> b(a, row, sample, block, image.tap_count);
    for (int64_t oy = 0; oy < a.out_height; ++oy) line<T>(a, image, b, oy, 0);
    if (a.products) b.write_moments(a);
  }
}

// Where images are put that need a border.
template <class X>
struct Frame {
  X* memory;     // null: they need none
  int64_t line;  // elements
  X border;
  bool filled;  // with border
};

template <class X>
const X* framed(const ConvolutionArgs<X>& a, int64_t parent, int64_t sample, Frame<X>& frame) {
  const int64_t line = a.width * a.channels;
  const X* source = a.x + (parent * a.samples + sample) * a.height * line;
  if (!frame.memory) return source;
  if (!frame.filled || frame.border != a.padding[parent]) {
    frame.border = a.padding[parent];
    frame.filled = true;
    std::fill_n(frame.memory, (a.height + a.before[0] + a.after[0]) * frame.line, frame.border);
  }
  X* to = frame.memory + a.before[0] * frame.line + a.before[1] * a.channels;
  for (int64_t y = 0; y < a.height; ++y) std::memcpy(to + y * frame.line, source + y * line, line * sizeof(X));
  return frame.memory;
}

}  // namespace

template <class X>
void coalition_convolution(const ConvolutionArgs<X>& a, int64_t first_image, int64_t last_image) {
  constexpr int64_t together = Multiplied<X>::together;
  // Depthwise blocks of 16 channels read past the last pixel where the channels are no multiple of 16.
  const int64_t beyond = a.depthwise && a.channels % kLanes ? kLanes : 0;
  const int64_t height = a.height + a.before[0] + a.after[0], width = a.width + a.before[1] + a.after[1];
  const int64_t size = height * width * a.channels + beyond;
  const bool copied = height > a.height || width > a.width || beyond;
  const Buffer<X> padded(copied ? size : 0);
  if (beyond) std::memset(padded.data(), 0, size * sizeof(X));
  const int64_t line = width * a.channels, tap_count = a.kernel[0] * a.kernel[1];
  const int run = a.depth % (kRun * together) ? 1 : kRun;
  const Buffer<int64_t> taps(tap_count), runs(tap_count * (a.depth / (run * together)));
  int64_t *tap = taps.data(), *next = runs.data();
  for (int64_t ky = 0; ky < a.kernel[0]; ++ky) {
    for (int64_t kx = 0; kx < a.kernel[1]; ++kx) {
      *tap = ky * a.dilation[0] * line + kx * a.dilation[1] * a.channels;
      for (int64_t c = 0; c < a.depth; c += run * together) *next++ = *tap + c;
      ++tap;
    }
  }
  Image<X> image{nullptr, line, taps.data(), tap_count, runs.data(), next - runs.data(), run};
  Frame<X> frame{copied ? padded.data() : nullptr, line, X{}, false};
  for (int64_t unit = first_image; unit < last_image; ++unit) {
    const int64_t row = unit / a.samples, sample = unit % a.samples;
    image.x = framed(a, a.parent[row], sample, frame);
    constexpr int kAlone = std::is_same_v<X, float> ? 16 : 8;
    int64_t block = 0;
    if (a.depthwise) channels<1, kAlone>(a, image, row, sample, block, a.outs);
    for (int64_t last = a.group_outs; block < a.outs; last += a.group_outs, image.x += a.depth) {
      if (!std::is_same_v<X, float>) channels<4, 4>(a, image, row, sample, block, last);
      channels<2, 8>(a, image, row, sample, block, last);
      channels<1, kAlone>(a, image, row, sample, block, last);
    }
  }
}

template void coalition_convolution(const ConvolutionArgs<uint8_t>&, int64_t, int64_t);
template void coalition_convolution(const ConvolutionArgs<int16_t>&, int64_t, int64_t);
template void coalition_convolution(const ConvolutionArgs<float>&, int64_t, int64_t);

}  // namespace smpq::cpu::SMPQ_ISA
