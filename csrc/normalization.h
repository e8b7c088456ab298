// Rows that are normalized by their own statistics, for the ops that end in an Epilogue.
#pragma once

#include "tensor.h"

namespace smpq {

// Every row by its own mean and biased variance: their moments become the rows' scale and bias.
class Normalization {
 public:
  std::optional<Tensor> scale, bias;  // [rows, channels]; where there is a norm, of its own, filled by `run`
  Tensor statistics;                  // [rows, 2, channels]: means and variances; no rows where there is no norm

  // norm: float64 [2, channels], weight and bias, after those of the values.
  Normalization(const char* op, const Tensor& like, const OptionalTensor& norm, double eps, int64_t rows,
                int64_t channels, const OptionalTensor& scale_, const OptionalTensor& bias_)
      : scale(scale_),
        bias(bias_),
        statistics(torch::stable::new_empty(like, {norm ? rows : 0, 2, channels}, ScalarType::Float)),
        norm_(norm),
        eps_(eps) {
    if (!norm) return;
    check_tensor(op, like, *norm, "norm", ScalarType::Double, {2, channels});
    const auto own = [&](const OptionalTensor& given, double otherwise) {
      Tensor made = torch::stable::new_empty(statistics, {rows, channels});
      if (given) {
        check_tensor(op, like, *given, "scale or bias", ScalarType::Float, {rows, channels});
        torch::stable::copy_(made, *given);
      } else {
        torch::stable::fill_(made, otherwise);
      }
      return made;
    };
    scale = own(scale_, 1.0);
    bias = own(bias_, 0.0);
  }

  // So many rows that a cache still holds them when they are read for the second time; on a GPU so many that launches,
  // four for each of these groups, cost less than the memory's bandwidth (not measured).
  int64_t rows_together(const Epilogue& e, int64_t rows) const {
    const int64_t together = on_device(statistics) ? 256 << 20 : 8 << 20;  // bytes
    const int64_t row = std::max<int64_t>(e.pixels * e.channels * 4, 1);
    return std::clamp<int64_t>(together / row, 1, std::max<int64_t>(rows, 1));
  }

  // The epilogue of values by their own statistics, rows_together at a time: take(args, last, moments) makes or finds
  // the values of rows [args.first_row, last), and their moments, [rows, parts, 2, channels].
  template <class Take>
  void run(EpilogueArgs args, int64_t parts, Take&& take) const {
    const Epilogue& e = args.epilogue;
    const int64_t group = rows_together(e, args.rows), channels = e.channels;
    const Tensor kept = new_float64(statistics, {group * parts * 2 * channels});
    double* to = mutable_data<double>(kept);
    const NormalizationArgs norm{data<double>(norm_),
                                 eps_,
                                 mutable_data<float>(*scale),
                                 mutable_data<float>(*bias),
                                 mutable_data<float>(statistics),
                                 e.pixels,
                                 channels};
    const int64_t rows = args.rows;
    for (args.first_row = 0; args.first_row < rows; args.first_row += group) {
      const int64_t first = args.first_row, last = std::min(first + group, rows);
      take(args, last, to);
      launch(
          statistics, [&](void* stream) { cuda::normalize_rows(norm, first, last, to, parts, stream); },
          [&](int64_t begin, int64_t end) {
            for (int64_t unit = begin; unit < end; ++unit) {
              const int64_t row = first + unit / channels, c = unit % channels;
              double sum = 0, square = 0;
              for (int64_t part = 0; part < parts; ++part) {
                const double* at = to + ((row - first) * parts + part) * 2 * channels + c;
                sum += at[0];
                square += at[channels];
              }
              normalize(norm, row, c, sum, square);
            }
          },
          (last - first) * channels, 1 << 12);
      finish_rows(statistics, args, last);
    }
  }

  // The epilogue of rows [args.first_row, last_row).
  static void finish_rows(const Tensor& like, const EpilogueArgs& args, int64_t last_row) {
    const int64_t units = cpu::epilogue_units(args.epilogue), start = args.first_row * units;
    launch(
        like, [&](void* stream) { cuda::coalition_epilogue(args, last_row, stream); },
        [&](int64_t first, int64_t last) { SMPQ_ON_CPU(coalition_epilogue, args, start + first, start + last); },
        last_row * units - start, 4);
  }

  // Takes the moments of values that are there, in moment_parts(e) parts a row.
  static void moments(const Tensor& like, const EpilogueArgs& args, int64_t last_row, double* to) {
    launch(
        like, [&](void* stream) { cuda::coalition_moments(args, last_row, to, stream); },
        [&](int64_t first, int64_t last) { SMPQ_ON_CPU(coalition_moments, args, to, first, last); },
        (last_row - args.first_row) * cpu::epilogue_units(args.epilogue), 4);
  }
  static int64_t moment_parts(const Tensor& like, const Epilogue& e) {
    return on_device(like) ? cuda::moment_parts(e) : cpu::epilogue_units(e);
  }

 private:
  OptionalTensor norm_;
  double eps_;
};

}  // namespace smpq
