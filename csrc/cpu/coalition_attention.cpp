// coalition_attention on the CPU, one head of one sample of one row at a time: the scores of 32 queries stay in the
// nearest cache, from which they are weighed. Compiled once per instruction set, into the namespace SMPQ_ISA.
#include <algorithm>
#include <limits>

#include "buffer.h"
#include "vectors.h"

namespace smpq::cpu::SMPQ_ISA {
namespace {

constexpr int kVectors = 2, kQueries = kVectors * kLanes;  // together
constexpr int kStep = 8;                                   // keys, or entries of a value, together

SMPQ_INLINE void multiply_add(Floats& sum, const Floats& a, float b) {
#if defined(__AVX512F__)
  auto& v = reinterpret_cast<__m512&>(sum);
  v = _mm512_fmadd_ps(reinterpret_cast<const __m512&>(a), _mm512_set1_ps(b), v);
#else
  sum += a * b;
#endif
}

// exp(x) for x <= 0 within 2 units of the last place; 0 below -87, where it would be denormal; NaN stays. Reduction and
// polynomial are those of Cephes' expf.
SMPQ_INLINE void exponential(Floats& x) {
#if defined(__AVX512F__)
  const __m512 given = reinterpret_cast<const __m512&>(x), one = _mm512_set1_ps(1.0f);
  const __m512 whole = _mm512_maskz_roundscale_ps(0xffff, _mm512_mul_ps(given, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), given);
  r = _mm512_fnmadd_ps(whole, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 y = _mm512_set1_ps(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
  }
  y = _mm512_fmadd_ps(_mm512_fmadd_ps(y, r, one), r, one);
  const __mmask16 counts = _mm512_cmp_ps_mask(given, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
  reinterpret_cast<__m512&>(x) = _mm512_maskz_scalef_ps(counts, y, whole);
#else
  const Floats whole = (x * 1.44269504088896341f + kRound) - kRound;
  const Floats r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
  Floats y = Floats{} + 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const Floats bounded = whole >= -126.0f ? whole : Floats{} - 126.0f;  // also NaN, which stays in y
  const Ints power = (__builtin_convertvector(bounded, Ints) + 127) << 23;
  Floats factor;
  load(factor, &power);
  x = x < -87.0f ? Floats{} : y * factor;
#endif
}

// The memory of one head.
struct Head {
  const AttentionArgs& a;
  const int64_t value_size;  // up to a multiple of kStep
  const Buffer<float> zeros, v, q, scores;
  const float* k = nullptr;

  explicit Head(const AttentionArgs& args)
      : a(args),
        value_size((a.value_size + kStep - 1) / kStep * kStep),
        zeros(a.size),
        v(a.keys * value_size),
        q(a.size * kQueries),
        scores((a.keys + kStep) * kQueries) {
    std::fill_n(zeros.data(), a.size, 0.0f);
  }

  // Values [keys, value_size], zeros where none are.
  void gather(const float* from) const {
    for (int64_t key = 0; key < a.keys; ++key) {
      float* to = v.data() + key * value_size;
      std::fill(std::copy_n(from + key * a.v_stride[2], a.value_size, to), to + value_size, 0.0f);
    }
  }
};

// The scores of all queries with keys [0, count), and the largest of each.
SMPQ_INLINE void score(const Head& h, int64_t first_query, int64_t count, Floats (&largest)[kVectors]) {
  const AttentionArgs& a = h.a;
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  for (Floats& m : largest) m = Floats{} + kNever;
  const Floats lanes{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int64_t key = 0; key < count; key += kStep) {
    Floats sum[kStep][kVectors] = {};
    const float* k[kStep];
    for (int j = 0; j < kStep; ++j) k[j] = key + j < a.keys ? h.k + (key + j) * a.k_stride[2] : h.zeros.data();
    for (int64_t d = 0; d < a.size; ++d) {
      Floats q[kVectors];
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; ++n) load(q[n], h.q.data() + d * kQueries + n * kLanes);
#pragma GCC unroll 8
      for (int j = 0; j < kStep; ++j) {
#pragma GCC unroll 2
        for (int n = 0; n < kVectors; ++n) multiply_add(sum[j][n], q[n], k[j][d]);
      }
    }
    const bool all = key + kStep <= a.keys && (!a.causal || key + kStep <= first_query + 1);
#pragma GCC unroll 8
    for (int j = 0; j < kStep; ++j) {
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; ++n) {
        Floats s = sum[j][n];
        if (!all) {
          const auto before = static_cast<float>(key + j - first_query - n * kLanes);  // queries from here on see it
          if (a.causal) s = lanes >= before ? s : Floats{} + kNever;
          if (key + j >= a.keys) s = Floats{} + kNever;
        }
        largest[n] = largest[n] > s ? largest[n] : s;  // also NaN
        std::memcpy(h.scores.data() + (key + j) * kQueries + n * kLanes, &s, sizeof s);
      }
    }
  }
}

// Entries [first, first + kStep), as far as they are there, of 16 queries, as far as they are: a lane is a query.
SMPQ_INLINE void write(const Head& h, float* out, int64_t first, int64_t queries, const Floats (&entry)[kStep]) {
  // Twice two vectors interleaved: four entries of a query side by side.
  float four[kStep / 4][4][kLanes];  // [.., a query of four, its four]
  for (int half = 0; half < kStep / 4; ++half) {
    const Floats* e = entry + 4 * half;
    Floats pair[4];
    for (int k = 0; k < 2; ++k) {
      pair[k] =
          __builtin_shufflevector(e[2 * k], e[2 * k + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
      pair[2 + k] =
          __builtin_shufflevector(e[2 * k], e[2 * k + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    }
    for (int k = 0; k < 2; ++k) {
      const Floats &a = pair[2 * k], &b = pair[2 * k + 1];
      const Floats even = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      const Floats odd = __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
      std::memcpy(four[half][2 * k], &even, sizeof even);
      std::memcpy(four[half][2 * k + 1], &odd, sizeof odd);
    }
  }
  const int64_t step = h.a.heads * h.a.value_size, there = h.a.value_size - first;
  for (int64_t i = 0; i < queries; ++i, out += step) {
    for (int half = 0; half < kStep / 4; ++half) {
      const float* from = four[half][i % 4] + i / 4 * 4;
      if (there >= 4 * half + 4) {
        std::memcpy(out + first + 4 * half, from, 4 * sizeof(float));
      } else {
        for (int64_t d = 4 * half; d < there; ++d) out[first + d] = from[d - 4 * half];
      }
    }
  }
}

// softmax(scores) * v, of so many queries.
SMPQ_INLINE void weigh(const Head& h, int64_t count, const Floats (&largest)[kVectors], int64_t queries, float* out) {
  Floats total[kVectors] = {};
  for (int64_t key = 0; key < count; ++key) {
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; ++n) {
      float* at = h.scores.data() + key * kQueries + n * kLanes;
      Floats s;
      load(s, at);
      s -= largest[n];
      exponential(s);
      total[n] += s;
      std::memcpy(at, &s, sizeof s);
    }
  }
  for (Floats& t : total) t = 1.0f / t;
  for (int64_t first = 0; first < h.value_size; first += kStep) {
    Floats sum[kStep][kVectors] = {};
    const int64_t there = std::min(count, h.a.keys);
    for (int64_t key = 0; key < there; ++key) {
      const float* v = h.v.data() + key * h.value_size + first;
      Floats p[kVectors];
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; ++n) load(p[n], h.scores.data() + key * kQueries + n * kLanes);
#pragma GCC unroll 8
      for (int j = 0; j < kStep; ++j) {
#pragma GCC unroll 2
        for (int n = 0; n < kVectors; ++n) multiply_add(sum[j][n], p[n], v[j]);
      }
    }
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; ++n) {
      Floats entry[kStep];
#pragma GCC unroll 8
      for (int j = 0; j < kStep; ++j) entry[j] = sum[j][n] * total[n];
      write(h, out + n * kLanes * h.a.heads * h.a.value_size, first, std::min<int64_t>(kLanes, queries - n * kLanes),
            entry);
    }
  }
}

}  // namespace

void coalition_attention(const AttentionArgs& a, int64_t first_head, int64_t last_head) {
  Head h(a);
  for (int64_t unit = first_head; unit < last_head; ++unit) {
    const int64_t head = unit % a.heads, sample = unit / a.heads % a.samples, row = unit / a.heads / a.samples;
    const auto start = [&](const float* x, const int64_t* rows, const int64_t* stride) {
      return x + (rows[row] * a.samples + sample) * stride[0] + head * stride[1];
    };
    const float* q = start(a.q, a.q_row, a.q_stride);
    h.k = start(a.k, a.k_row, a.k_stride);
    h.gather(start(a.v, a.v_row, a.v_stride));
    float* out = a.out + ((row * a.samples + sample) * a.queries * a.heads + head) * a.value_size;
    for (int64_t first = 0; first < a.queries; first += kQueries) {
      const int64_t there = std::min<int64_t>(kQueries, a.queries - first);
      for (int64_t i = 0; i < kQueries; ++i) {
        const float* from = q + (first + i) * a.q_stride[2];
        for (int64_t d = 0; d < a.size; ++d) h.q.data()[d * kQueries + i] = i < there ? from[d] * a.scale : 0.0f;
      }
      const int64_t seen = a.causal ? std::min(a.keys, first + kQueries) : a.keys;
      const int64_t count = (seen + kStep - 1) / kStep * kStep;
      Floats largest[kVectors];
      score(h, first, count, largest);
      weigh(h, count, largest, there, out + first * a.heads * a.value_size);
    }
  }
}

}  // namespace smpq::cpu::SMPQ_ISA
