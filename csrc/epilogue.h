// From tensors to the arguments of an Epilogue, for the ops that end in one.
#pragma once

#include <cmath>

#include "tensor.h"

namespace smpq {

using OptionalTensor = std::optional<Tensor>;

// Sizes of -1 are any.
inline void check_tensor(const char* op, const Tensor& t, const char* name, ScalarType type,
                         const std::vector<int64_t>& size) {
  bool fits = t.scalar_type() == type && t.is_contiguous() && t.dim() == static_cast<int64_t>(size.size());
  for (int64_t d = 0; fits && d < t.dim(); ++d) fits = size[d] < 0 || t.size(d) == size[d];
  std::string wanted = "[";
  for (size_t d = 0; d < size.size(); ++d) {
    wanted.append(d ? ", " : "").append(size[d] < 0 ? "*" : std::to_string(size[d]));
  }
  SMPQ_CHECK(fits, op, ": ", name, " ", shape_of(t), " must be contiguous, of its dtype, and ", wanted, "]");
}

inline void check_indices(const char* op, const Tensor& t, const char* name, int64_t bound) {
  const int64_t* index = data<int64_t>(t);
  for (int64_t k = 0; k < t.numel(); ++k) {
    SMPQ_CHECK(index[k] >= 0 && index[k] < bound, op, ": ", name, "[", k, "] is ", index[k], ", there are ", bound);
  }
}

// An Epilogue with the tensors that it writes, and the children of every row.
struct EpilogueTensors {
  Epilogue epilogue{};
  std::vector<Tensor> out;  // the values (no rows where they are not wanted), and each list of children
  std::vector<int64_t> child_begin;
  std::vector<Child> children;
  std::vector<Candidate> candidates;
};

// Scale, zero point and bounds, side by side.
inline Grid<float> grid_at(const float* g) {
  return make_grid<float>(g[0], g[1], static_cast<int32_t>(g[2]), static_cast<int32_t>(g[3]));
}

// The candidates that have a share in mixture `i` of a grid [children, candidates, 5] go to the end of `found`.
inline void add_candidates(Child& child, const Tensor& grid, int64_t i, std::vector<Candidate>& found) {
  const float* g = data<float>(grid) + i * grid.size(1) * 5;
  child.candidates = found.data() + found.size();
  for (int64_t c = 0; c < grid.size(1); ++c, g += 5) {
    if (g[4] == 0.0f) continue;
    const auto folded = fold(grid_at(g));
    found.push_back({folded.inv_scale, folded.low, folded.high, folded.scale, g[4]});
    ++child.count;
  }
}

// `size`: [samples, height, width] of one row. child_row[k] [children]: the rows that they descend from; child_bits[k]:
// what they become: 8, codes; 16, mixtures as whole numbers; 32, mixtures. child_grid[k]: scale, zero point and bounds,
// [children, 4], of codes; and the share, [children, candidates, 5], of every candidate of mixtures.
inline EpilogueTensors make_epilogue(const char* op, const Tensor& like, int64_t rows, const std::vector<int64_t>& size,
                                     int64_t channels, const OptionalTensor& scale, const OptionalTensor& bias,
                                     const OptionalTensor& residual, const OptionalTensor& residual_row, double low,
                                     double high, bool values, const std::vector<Tensor>& child_row,
                                     const std::vector<Tensor>& child_grid, const std::vector<int64_t>& child_bits) {
  EpilogueTensors made;
  Epilogue& e = made.epilogue;
  e.pixels = size[0] * size[1] * size[2];
  e.channels = channels;
  e.code_channels = (channels + 3) / 4 * 4;
  e.low = static_cast<float>(low);
  e.high = static_cast<float>(high);
  SMPQ_CHECK(scale.has_value() == bias.has_value(), op, ": scale and bias come together");
  if (scale) {
    check_tensor(op, *scale, "scale", ScalarType::Float, {rows, channels});
    check_tensor(op, *bias, "bias", ScalarType::Float, {rows, channels});
  }
  e.scale = data<float>(scale);
  e.bias = data<float>(bias);
  SMPQ_CHECK(residual.has_value() == residual_row.has_value(), op, ": residual and residual_row come together");
  if (residual) {
    check_tensor(op, *residual, "residual", ScalarType::Float, {-1, size[0], size[1], size[2], channels});
    check_tensor(op, *residual_row, "residual_row", ScalarType::Long, {rows});
    check_indices(op, *residual_row, "residual_row", residual->size(0));
  }
  e.residual = data<float>(residual);
  e.residual_row = data<int64_t>(residual_row);
  const auto shape = [&](int64_t n, int64_t c) { return std::vector<int64_t>{n, size[0], size[1], size[2], c}; };
  made.out.push_back(torch::stable::new_empty(like, shape(values ? rows : 0, channels), ScalarType::Float));
  e.values = values ? mutable_data<float>(made.out[0]) : nullptr;

  SMPQ_CHECK(child_row.size() == child_grid.size() && child_row.size() == child_bits.size(), op,
             ": child_row, child_grid and child_bits must have as many entries");
  auto& begin = made.child_begin;
  begin.assign(rows + 1, 0);
  int64_t total = 0, candidates = 0;
  for (size_t k = 0; k < child_row.size(); ++k) {
    const int64_t n = child_row[k].numel(), bits = child_bits[k];
    SMPQ_CHECK(bits == 8 || bits == 16 || bits == 32, op, ": child_bits are 8, 16 or 32, not ", bits);
    check_tensor(op, child_row[k], "child_row", ScalarType::Long, {n});
    check_tensor(op, child_grid[k], "child_grid", ScalarType::Float,
                 bits == 8 ? std::vector<int64_t>{n, 4} : std::vector<int64_t>{n, -1, 5});
    check_indices(op, child_row[k], "child_row", rows);
    const ScalarType type = bits == 8 ? ScalarType::Byte : bits == 16 ? ScalarType::Short : ScalarType::Float;
    made.out.push_back(torch::stable::new_empty(like, shape(n, bits == 32 ? channels : e.code_channels), type));
    for (int64_t i = 0; i < n; ++i) ++begin[data<int64_t>(child_row[k])[i] + 1];
    total += n;
    if (bits > 8) candidates += n * child_grid[k].size(1);
  }
  std::partial_sum(begin.begin(), begin.end(), begin.begin());
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  made.children.resize(total);
  made.candidates.reserve(candidates);  // children point into it
  for (size_t k = 0; k < child_row.size(); ++k) {
    for (int64_t i = 0; i < child_row[k].numel(); ++i) {
      Child& child = made.children[next[data<int64_t>(child_row[k])[i]]++];
      const Tensor& out = made.out[k + 1];
      if (child_bits[k] == 8) {
        const float* g = data<float>(child_grid[k]) + 4 * i;
        SMPQ_CHECK(g[2] >= 0 && g[3] <= 255, op, ": the bounds of child_grid must be from 0 to 255");
        const auto folded = fold(grid_at(g));
        child.inv_scale = folded.inv_scale;
        child.low = folded.low;
        child.high = folded.high;
        child.zero_point = g[1];
        child.codes = mutable_data<uint8_t>(out) + i * e.pixels * e.code_channels;
        continue;
      }
      add_candidates(child, child_grid[k], i, made.candidates);
      if (child_bits[k] == 16) {
        child.fixed = mutable_data<int16_t>(out) + i * e.pixels * e.code_channels;
      } else {
        child.mixed = mutable_data<float>(out) + i * e.pixels * channels;
      }
    }
  }
  e.child_begin = begin.data();
  e.children = made.children.data();
  return made;
}

// Every row by its own mean and biased variance: their moments become the rows' scale and bias.
class Normalization {
 public:
  std::optional<Tensor> scale, bias;  // [rows, channels]; where there is a norm, of its own, filled by `apply`
  Tensor statistics;                  // [rows, 2, channels]: means and variances; no rows where there is no norm

  // norm: float64 [2, channels], weight and bias, after those of the values.
  Normalization(const char* op, const Tensor& like, const OptionalTensor& norm, double eps, int64_t rows,
                int64_t channels, const OptionalTensor& scale_, const OptionalTensor& bias_)
      : scale(scale_),
        bias(bias_),
        statistics(torch::stable::new_empty(like, {norm ? rows : 0, 2, channels}, ScalarType::Float)),
        norm_(norm),
        eps_(eps),
        channels_(channels) {
    if (!norm) return;
    check_tensor(op, *norm, "norm", ScalarType::Double, {2, channels});
    const std::vector<int64_t> size{rows, channels};
    const auto own = [&](const OptionalTensor& given, float otherwise) {
      const Tensor made = torch::stable::new_empty(like, size, ScalarType::Float);
      std::fill_n(mutable_data<float>(made), made.numel(), otherwise);
      if (given) {
        check_tensor(op, *given, "scale or bias", ScalarType::Float, size);
        std::copy_n(data<float>(*given), made.numel(), mutable_data<float>(made));
      }
      return made;
    };
    scale = own(scale_, 1.0f);
    bias = own(bias_, 0.0f);
  }

  // So many rows that a cache still holds them when they are read for the second time.
  static int64_t rows_together(const Epilogue& e, int64_t rows) {
    constexpr int64_t kCached = 8 << 20;  // bytes
    const int64_t row = std::max<int64_t>(e.pixels * e.channels * 4, 1);
    return std::clamp<int64_t>(kCached / row, 1, std::max<int64_t>(rows, 1));
  }

  // For groups of rows_together rows [first, last): take(first, last, moments) writes moments [rows, parts, 2,
  // channels], and finish(first, last) reads the scale and bias that they make.
  template <class Take, class Finish>
  void run(const Epilogue& e, int64_t rows, int64_t parts, Take&& take, Finish&& finish) const {
    const int64_t group = rows_together(e, rows), size = parts * 2 * channels_;
    const Tensor kept = new_float64(statistics, {group * size});
    double* moments = mutable_data<double>(kept);
    for (int64_t first = 0; first < rows; first += group) {
      const int64_t last = std::min(first + group, rows);
      take(first, last, moments);
      for (int64_t row = first; row < last; ++row) apply(row, moments + (row - first) * size, parts, e);
      finish(first, last);
    }
  }

 private:
  // moments: [parts, 2, channels] of the row.
  void apply(int64_t row, const double* moments, int64_t parts, const Epilogue& e) const {
    std::vector<double> total(2 * channels_, 0.0);
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t c = 0; c < 2 * channels_; ++c) total[c] += *moments++;
    }
    const double* affine = data<double>(*norm_);
    float* row_scale = mutable_data<float>(*scale) + row * channels_;
    float* row_bias = mutable_data<float>(*bias) + row * channels_;
    float* found = mutable_data<float>(statistics) + row * 2 * channels_;
    for (int64_t c = 0; c < channels_; ++c) {
      const double mean = total[c] / e.pixels, step = row_scale[c];
      const double variance = std::max(total[channels_ + c] / e.pixels - mean * mean, 0.0) * step * step;
      const double factor = affine[c] / std::sqrt(variance + eps_);
      found[c] = static_cast<float>(mean * step + row_bias[c]);
      found[channels_ + c] = static_cast<float>(variance);
      row_scale[c] = static_cast<float>(step * factor);
      row_bias[c] = static_cast<float>(affine[channels_ + c] - mean * step * factor);
    }
  }

  OptionalTensor norm_;
  double eps_;
  int64_t channels_;
};

// The epilogue of rows [first_row, last_row), shared out over threads.
inline void finish_rows(const EpilogueArgs& args, int64_t first_row, int64_t last_row) {
  const int64_t units = cpu::epilogue_units(args.epilogue);
  torch::stable::parallel_for(first_row * units, last_row * units, 4,
                              [&](int64_t first, int64_t last) { SMPQ_ON_CPU(coalition_epilogue, args, first, last); });
}

}  // namespace smpq
