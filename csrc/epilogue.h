// From tensors to the arguments of an Epilogue, for the ops that end in one.
#pragma once

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

// On the CPU alone: elsewhere looking would mean waiting.
inline void check_indices(const char* op, const Tensor& t, const char* name, int64_t bound) {
  if (on_device(t)) return;
  const int64_t* index = data<int64_t>(t);
  for (int64_t k = 0; k < t.numel(); ++k) {
    SMPQ_CHECK(index[k] >= 0 && index[k] < bound, op, ": ", name, "[", k, "] is ", index[k], ", there are ", bound);
  }
}

// An Epilogue with the tensors that it writes, and the memory of its children.
struct EpilogueTensors {
  Epilogue epilogue{};
  std::vector<Tensor> out;  // the values (no rows where they are not wanted), and each list of children
  std::vector<int64_t> child_begin;
  std::vector<Child> children;
  std::vector<Candidate> candidates;
  std::vector<Tensor> kept;  // on CUDA: the memory of these three
};

// The children of every row, put together on the host.
inline void plan_on_host(const char* op, EpilogueTensors& made, const std::vector<ChildList>& lists, int64_t rows) {
  auto& begin = made.child_begin;
  begin.assign(rows + 1, 0);
  for (const ChildList& list : lists) {
    for (int64_t i = 0; i < list.count; ++i) {
      ++begin[list.row[i] + 1];
      const float* g = list.grid + 4 * i;
      SMPQ_CHECK(list.bits > 8 || (g[2] >= 0 && g[3] <= 255), op, ": the bounds of child_grid must be from 0 to 255");
    }
  }
  std::partial_sum(begin.begin(), begin.end(), begin.begin());
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  made.children.resize(begin.back());
  for (const ChildList& list : lists) {
    for (int64_t i = 0; i < list.count; ++i) {
      made.children[next[list.row[i]]++] = child_of(list, i, made.epilogue);
    }
  }
  made.epilogue.child_begin = begin.data();
  made.epilogue.children = made.children.data();
}

// The same in device memory, without waiting for it.
inline void plan_on_device(EpilogueTensors& made, const Tensor& like, const std::vector<ChildList>& lists, int64_t rows,
                           int64_t total) {
  const auto memory = [&](int64_t bytes) {
    made.kept.push_back(torch::stable::new_empty(like, {bytes}, ScalarType::Byte));
    return static_cast<void*>(mutable_data<uint8_t>(made.kept.back()));
  };
  auto* first = static_cast<int64_t*>(memory(rows * sizeof(int64_t)));
  auto* children = static_cast<Child*>(memory(total * sizeof(Child)));
  made.epilogue.child_begin = first;
  made.epilogue.children = children;
  launch(
      like,
      [&](void* stream) {
        cuda::plan_children(lists.data(), lists.size(), made.epilogue, rows, first, children, stream);
      },
      [](int64_t, int64_t) {}, 0, 1);
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
  const int64_t count = child_row.size();
  SMPQ_CHECK(count <= cuda::kChildLists, op, ": at most ", cuda::kChildLists, " lists of children, not ", count);
  int64_t total = 0, candidates = 0;
  std::vector<ChildList> lists(count);
  for (int64_t k = 0; k < count; ++k) {
    const int64_t n = child_row[k].numel(), bits = child_bits[k];
    SMPQ_CHECK(bits == 8 || bits == 16 || bits == 32, op, ": child_bits are 8, 16 or 32, not ", bits);
    check_tensor(op, child_row[k], "child_row", ScalarType::Long, {n});
    check_tensor(op, child_grid[k], "child_grid", ScalarType::Float,
                 bits == 8 ? std::vector<int64_t>{n, 4} : std::vector<int64_t>{n, -1, 5});
    SMPQ_CHECK(same_device(child_row[k], like) && same_device(child_grid[k], like), op,
               ": child_row and child_grid must be on the device of x");
    check_indices(op, child_row[k], "child_row", rows);
    const ScalarType type = bits == 8 ? ScalarType::Byte : bits == 16 ? ScalarType::Short : ScalarType::Float;
    made.out.push_back(torch::stable::new_empty(like, shape(n, bits == 32 ? channels : e.code_channels), type));
    lists[k] = {data<int64_t>(child_row[k]),
                data<float>(child_grid[k]),
                made.out.back().mutable_data_ptr(),
                n,
                bits == 8 ? 0 : child_grid[k].size(1),
                bits,
                nullptr};
    total += n;
    candidates += n * lists[k].candidates;
  }
  Candidate* folded = nullptr;
  if (on_device(like)) {
    made.kept.push_back(
        torch::stable::new_empty(like, {candidates * static_cast<int64_t>(sizeof(Candidate))}, ScalarType::Byte));
    folded = reinterpret_cast<Candidate*>(mutable_data<uint8_t>(made.kept.back()));
  } else {
    made.candidates.resize(candidates);
    folded = made.candidates.data();
  }
  for (ChildList& list : lists) {
    list.folded = folded;
    folded += list.count * list.candidates;
  }
  on_device(like) ? plan_on_device(made, like, lists, rows, total) : plan_on_host(op, made, lists, rows);
  return made;
}

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
    check_tensor(op, *norm, "norm", ScalarType::Double, {2, channels});
    const auto own = [&](const OptionalTensor& given, double otherwise) {
      Tensor made = torch::stable::new_empty(statistics, {rows, channels});
      if (given) {
        check_tensor(op, *given, "scale or bias", ScalarType::Float, {rows, channels});
        torch::stable::copy_(made, *given);
      } else {
        torch::stable::fill_(made, otherwise);
      }
      return made;
    };
    scale = own(scale_, 1.0);
    bias = own(bias_, 0.0);
  }

  // So many rows that a cache still holds them when they are read for the second time.
  static int64_t rows_together(const Epilogue& e, int64_t rows) {
    constexpr int64_t kCached = 8 << 20;  // bytes
    const int64_t row = std::max<int64_t>(e.pixels * e.channels * 4, 1);
    return std::clamp<int64_t>(kCached / row, 1, std::max<int64_t>(rows, 1));
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
