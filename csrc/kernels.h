// One plain argument struct per kernel, and the signatures of the CPU and CUDA sides. No torch, no CUDA header.
#pragma once

#include <cstdint>

#include "activation.h"

namespace smpq {

// A dense tensor seen as [outer, channels, inner], the channel being what owns a scale. Per tensor: channels = 1.
struct Shape3 {
  int64_t outer, channels, inner;
  int64_t elements() const { return outer * channels * inner; }
};

// Reductions write one partial sum per piece of at most this many elements of one channel, and the caller adds the
// pieces up in order: the result does not depend on threads, blocks or the device's scheduling.
constexpr int64_t kPiece = 4096;
inline int64_t pieces_per_run(const Shape3& s) { return (s.inner + kPiece - 1) / kPiece; }
inline int64_t piece_count(const Shape3& s) { return s.outer * s.channels * pieces_per_run(s); }

// T: element, C: what arithmetic is done in (float, or double for double), Z: int32_t or C.
template <class T, class C, class Z>
struct FakeQuantizeArgs {
  const T* x;
  T* y;
  const C* scale;            // [channels]
  const Z* zero_point;       // [channels], or null for 0
  const int32_t* quant_min;  // [channels], or null for `bound_min`
  const int32_t* quant_max;  // [channels], or null for `bound_max`
  int32_t bound_min, bound_max;
  Shape3 shape;
};

template <class T, class C, class Z>
struct FakeQuantizeBackwardArgs {
  FakeQuantizeArgs<T, C, Z> forward;  // y unused
  const T* grad;
  T* grad_x;        // [elements]
  double* partial;  // [2, pieces]: gradients of scale and zero point; null when they are not wanted
};

// Row i of y is sum_c mixtures[i, c] * fake_quantize(x[parent[i]], grid c), added in the order of c, starting with the
// first non-zero weight; a weight of exactly 1 does not multiply, so that a one-hot row is fake_quantize bit for bit.
template <class T, class C, class Z>
struct CoalitionArgs {
  const T* x;                // [parents, elements]
  T* y;                      // [rows, elements]
  const C* scale;            // [candidates] or [candidates, channels]
  const Z* zero_point;       // the same, or null for 0
  const int32_t* quant_min;  // [candidates]
  const int32_t* quant_max;  // [candidates]
  const C* mixtures;         // [rows, candidates]
  const int64_t* parent;     // [rows], or null where every row descends from x[0]
  int64_t rows, parents, candidates;
  bool per_channel;
  Shape3 shape;  // of one parent
};

template <class T, class C, class Z>
struct QuantizationErrorArgs {
  const T* x;
  const C* scale;            // [candidates] or [candidates, channels]
  const Z* zero_point;       // the same, or null for 0
  const int32_t* quant_min;  // [candidates]
  const int32_t* quant_max;  // [candidates]
  double* partial;           // [candidates, pieces]
  int64_t candidates;
  bool per_channel;
  Shape3 shape;
};

// A width of a mixture, its zero point folded into the bounds: share * rint(clamp(value * inv_scale, low, high)) *
// scale.
struct Candidate {
  float inv_scale, low, high, scale, share;
};

// A row that descends from a row of values, and where it goes: as codes, with the zero point folded into the bounds,
// code = rint(clamp(value * inv_scale, low, high)) + zero_point; or as a mixture of widths, rounded where it is fixed.
struct Child {
  uint8_t* codes;  // [pixels, code_channels]; one of the three is there
  float inv_scale, low, high, zero_point;
  int16_t* fixed;  // [pixels, code_channels]
  float* mixed;    // [pixels, channels]
  const Candidate* candidates;
  int64_t count;
  int64_t next;  // on CUDA: another child of the same row, or -1
};

// A list of children as its tensors say it.
struct ChildList {
  const int64_t* row;  // [count]
  const float* grid;   // [count, 4], or [count, candidates, 5]
  void* out;
  int64_t count, candidates, bits;
  Candidate* folded;  // [count, candidates]: memory for what children point to
};

// What becomes of the products of a layer, pixel by pixel, [channels] being the fastest dimension:
// value = activation(clamp(product * scale + bias + residual, low, high)), and what every child makes of it. Codes have
// their own number of channels, a multiple of four; those beyond `channels` are 0.
struct Epilogue {
  const float* scale;           // [rows, channels]
  const float* bias;            // [rows, channels]
  const float* residual;        // [residual rows, pixels, channels], or null
  const int64_t* residual_row;  // [rows]
  bool multiplies;              // the residual is a factor instead
  float low, high;
  Activation activation;
  float* values;               // [rows, pixels, channels], or null
  const int64_t* child_begin;  // [rows + 1]; on CUDA [rows]: the first child of each row, or -1
  const Child* children;
  int64_t pixels, channels, code_channels;
};

// Child i of a list.
SMPQ_HD Child child_of(const ChildList& list, int64_t i, const Epilogue& e) {
  Child child{};
  const int64_t width = list.bits == 8 ? 4 : 5;
  const float* g = list.grid + i * (list.bits == 8 ? 1 : list.candidates) * width;
  const auto folded = [](const float* at) {
    return fold(make_grid<float>(at[0], at[1], static_cast<int32_t>(at[2]), static_cast<int32_t>(at[3])));
  };
  if (list.bits == 8) {
    const FoldedGrid<float> f = folded(g);
    child.codes = static_cast<uint8_t*>(list.out) + i * e.pixels * e.code_channels;
    child.inv_scale = f.inv_scale;
    child.low = f.low;
    child.high = f.high;
    child.zero_point = g[1];
    return child;
  }
  Candidate* to = list.folded + i * list.candidates;
  child.candidates = to;
  for (int64_t c = 0; c < list.candidates; ++c, g += width) {
    if (g[4] == 0.0f) continue;
    const FoldedGrid<float> f = folded(g);
    to[child.count++] = Candidate{f.inv_scale, f.low, f.high, f.scale, g[4]};
  }
  if (list.bits == 16) {
    child.fixed = static_cast<int16_t*>(list.out) + i * e.pixels * e.code_channels;
  } else {
    child.mixed = static_cast<float*>(list.out) + i * e.pixels * e.channels;
  }
  return child;
}

// The epilogue of values that are there already: row r is that of values[parent[r]], or, without parent, of
// values[r - first_row]; without scale and bias, as it is.
struct EpilogueArgs {
  const float* values;    // [parents, pixels, channels]
  const int64_t* parent;  // [rows], or null
  int64_t first_row, rows;
  Epilogue epilogue;
  bool* broken = nullptr;  // [rows, samples]: where a sample holds NaN it becomes true
  int64_t plane = 1;       // pixels of a sample
};

// Every row by its own mean and biased variance, from [parts] sums and sums of squares of its values.
struct NormalizationArgs {
  const double* affine;  // [2, channels]: weight and bias
  double eps;
  float* scale;       // [rows, channels]: of the values before, then of the normalized ones
  float* bias;        // [rows, channels]
  float* statistics;  // [rows, 2, channels]: means and variances
  int64_t pixels, channels;
};

SMPQ_HD void normalize(const NormalizationArgs& a, int64_t row, int64_t channel, double sum, double square) {
  float& scale = a.scale[row * a.channels + channel];
  float& bias = a.bias[row * a.channels + channel];
  const double mean = sum / a.pixels, step = scale;
  const double spread = square / a.pixels - mean * mean;
  const double variance = (spread < 0 ? 0 : spread) * step * step;  // NaN stays
  const double factor = a.affine[channel] / std::sqrt(variance + a.eps);
  a.statistics[row * 2 * a.channels + channel] = static_cast<float>(mean * step + bias);
  a.statistics[(row * 2 + 1) * a.channels + channel] = static_cast<float>(variance);
  scale = static_cast<float>(step * factor);
  bias = static_cast<float>(a.affine[a.channels + channel] - mean * step * factor);
}

// What an input of type X is multiplied with, and what the products are added up in.
template <class X>
struct Multiplied;
template <>
struct Multiplied<uint8_t> {
  using Weight = int8_t;
  using Sum = int32_t;
  static constexpr int together = 4;  // channels in one instruction
};
template <>
struct Multiplied<int16_t> {
  using Weight = int16_t;
  using Sum = int32_t;
  static constexpr int together = 2;
};
template <>
struct Multiplied<float> {
  using Weight = float;
  using Sum = float;
  static constexpr int together = 1;
};

// Products of codes or fixed-point numbers, exact, or of floats: row r multiplies x[parent[r]] by weight variant[r],
// and adds start[r].
template <class X>
struct ConvolutionArgs {
  using Weight = typename Multiplied<X>::Weight;
  using Sum = typename Multiplied<X>::Sum;
  const X* x;              // [parents, samples, height, width, channels], channels a multiple of `together`
  const Weight* weight;    // [variants, outs, taps, depth / together, 16, together], outs counting blocks of 16 output
                           // channels; depthwise: [variants, outs, taps, 16]
  const X* padding;        // [parents]: what stands for 0
  const Sum* start;        // [rows, outs * 16]: minus the zero point's share of the products
  const int64_t* parent;   // [rows]
  const int64_t* variant;  // [rows]
  int64_t rows, samples, height, width, channels, outs, out_height, out_width;
  int64_t kernel[2], stride[2], before[2], after[2], dilation[2];  // of height and width; before, after: padding
  bool depthwise;
  int64_t depth;       // channels that an output channel sees: those of its group
  int64_t group_outs;  // blocks of a group
  Epilogue epilogue;
  // Not null: no epilogue, but the products as they are, of the rows from first_row on, and, on the CPU, their sums and
  // sums of squares over each image, exact up to 2^53.
  float* products;  // [rows, samples, out_height, out_width, channels]
  double* moments;  // [rows, samples, 2, channels]
  int64_t first_row;
};

// Attention with a tensor of its own rows for each of queries, keys and values: row r is that of query row q_row[r],
// key row k_row[r] and value row v_row[r]. Strides in elements, of samples, heads and tokens; the last dimension is
// dense.
struct AttentionArgs {
  const float *q, *k, *v;                // [its rows * samples, heads, tokens, size]
  const int64_t *q_row, *k_row, *v_row;  // [rows]
  int64_t q_stride[3], k_stride[3], v_stride[3];
  float* out;  // [rows, samples, queries, heads, value_size]
  int64_t rows, samples, heads, queries, keys, size, value_size;
  float scale;
  bool causal;  // query i sees keys up to i
};

namespace cpu {

enum class Isa { baseline, avx2, avx512 };
Isa isa();  // the best that this processor runs, or less if SMPQ_ISA=baseline|avx2 says so
const char* isa_name();

// Each kernel works on a range of its own units, so that the caller can share them out over threads.
#define SMPQ_DECLARE(level)                                                                                        \
  namespace level {                                                                                                \
  template <class T, class C, class Z>                                                                             \
  void fake_quantize(const FakeQuantizeArgs<T, C, Z>&, int64_t first_element, int64_t last_element);               \
  template <class T, class C, class Z> /* units: pieces, or elements where `partial` is null */                    \
  void fake_quantize_backward(const FakeQuantizeBackwardArgs<T, C, Z>&, int64_t first_unit, int64_t last_unit);    \
  template <class T, class C, class Z>                                                                             \
  void coalition_fake_quantize(const CoalitionArgs<T, C, Z>&, const int64_t* child_begin, const int64_t* children, \
                               int64_t first_block, int64_t last_block);                                           \
  template <class T, class C, class Z>                                                                             \
  void quantization_error(const QuantizationErrorArgs<T, C, Z>&, int64_t first_piece, int64_t last_piece);         \
  template <class X>                                                                                               \
  void coalition_convolution(const ConvolutionArgs<X>&, int64_t first_image, int64_t last_image);                  \
  void coalition_epilogue(const EpilogueArgs&, int64_t first_unit, int64_t last_unit);                             \
  void coalition_attention(const AttentionArgs&, int64_t first_head, int64_t last_head);                           \
  /* units: from first_row on; moments: [units, 2, channels], sums and sums of squares of the values */            \
  void coalition_moments(const EpilogueArgs&, double* moments, int64_t first_unit, int64_t last_unit);             \
  }
SMPQ_DECLARE(baseline)
SMPQ_DECLARE(avx2)
SMPQ_DECLARE(avx512)
#undef SMPQ_DECLARE

// Blocks of the coalition kernel: every parent is cut into blocks of this many elements; unit = parent * blocks +
// block.
constexpr int64_t kCoalitionBlock = 1024;
inline int64_t coalition_blocks(const Shape3& s) { return (s.elements() + kCoalitionBlock - 1) / kCoalitionBlock; }

// Units of coalition_epilogue: every row is cut into runs of so many pixels.
constexpr int64_t kEpiloguePixels = 256;
inline int64_t epilogue_units(const Epilogue& e) { return (e.pixels + kEpiloguePixels - 1) / kEpiloguePixels; }

}  // namespace cpu

namespace cuda {

// `stream` is a cudaStream_t. Launch errors throw std::runtime_error; an empty tensor returns without a launch.
template <class T, class C, class Z>
void fake_quantize(const FakeQuantizeArgs<T, C, Z>&, void* stream);
template <class T, class C, class Z>
void fake_quantize_backward(const FakeQuantizeBackwardArgs<T, C, Z>&, void* stream);
template <class T, class C, class Z>
void coalition_fake_quantize(const CoalitionArgs<T, C, Z>* tensors, int64_t count, void* stream);  // one launch
template <class T, class C, class Z>
void quantization_error(const QuantizationErrorArgs<T, C, Z>&, void* stream);

// Indices are not checked, but for those that are written by. Children and the first one of each row, [total] and
// [rows], from their lists.
void plan_children(const ChildList* lists, int64_t count, const Epilogue&, int64_t rows, int64_t* first,
                   Child* children, void* stream);
// Rows [first_row, last_row); moments: [last_row - first_row, parts, 2, channels].
constexpr int64_t kMomentPixels = 64;
inline int64_t moment_parts(const Epilogue& e) { return (e.pixels + kMomentPixels - 1) / kMomentPixels; }
void coalition_moments(const EpilogueArgs&, int64_t last_row, double* moments, void* stream);
void normalize_rows(const NormalizationArgs&, int64_t first_row, int64_t last_row, const double* moments, int64_t parts,
                    void* stream);
void coalition_epilogue(const EpilogueArgs&, int64_t last_row, void* stream);
template <class X>
void coalition_convolution(const ConvolutionArgs<X>&, int64_t last_row, void* stream);

}  // namespace cuda

// Every (T, C, Z) that is compiled; used by the instantiations of both sides.
#define SMPQ_FOR_EACH_TYPE(X) \
  X(float, float, int32_t)    \
  X(float, float, float)      \
  X(BFloat16, float, int32_t) \
  X(BFloat16, float, float)   \
  X(Float16, float, int32_t)  \
  X(Float16, float, float)    \
  X(double, double, int32_t)  \
  X(double, double, double)

}  // namespace smpq
