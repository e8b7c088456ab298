// coalition_convolution: schema, checks, and the way from tensors to the kernel's arguments.
#include "epilogue.h"

namespace smpq {
namespace {

constexpr const char* op = "coalition_convolution";

// Rows whose products a cache holds together are multiplied, normalized by their own statistics, and finished.
void run_normalized(ConvolutionArgs a, const Tensor& like, const Normalization& norm) {
  Epilogue& e = a.epilogue;
  const int64_t group = norm.rows_together(e, a.rows), parts = a.samples * 2 * e.channels;
  const Tensor products = torch::stable::new_empty(like, {group * e.pixels * e.channels}, ScalarType::Float);
  const Tensor moments = new_float64(like, {group * parts});
  a.products = mutable_data<float>(products);
  a.moments = mutable_data<double>(moments);
  std::vector<int64_t> parent(a.rows);
  for (int64_t row = 0; row < a.rows; ++row) parent[row] = row % group;
  const EpilogueArgs rest{a.products, parent.data(), a.rows, e};
  for (a.first_row = 0; a.first_row < a.rows; a.first_row += group) {
    const int64_t end = std::min(a.first_row + group, a.rows);
    torch::stable::parallel_for(a.first_row * a.samples, end * a.samples, 1, [&](int64_t first, int64_t last) {
      SMPQ_ON_CPU(coalition_convolution, a, first, last);
    });
    for (int64_t row = a.first_row; row < end; ++row) {
      norm.apply(row, a.moments + (row - a.first_row) * parts, a.samples, e);
    }
    finish_rows(rest, a.first_row, end);
  }
}

std::vector<Tensor> coalition_convolution(const Tensor& codes, const Tensor& padding, const Tensor& weight,
                                          const Tensor& start, const Tensor& parent, const Tensor& variant,
                                          const Tensor& scale, const Tensor& bias, const OptionalTensor& norm,
                                          double eps, const OptionalTensor& residual,
                                          const OptionalTensor& residual_row, double low, double high,
                                          std::vector<int64_t> geometry, bool depthwise, bool values,
                                          const std::vector<Tensor>& child_row, const std::vector<Tensor>& child_grid) {
  check_tensor(op, codes, "codes", ScalarType::Byte, {-1, -1, -1, -1, -1});
  SMPQ_CHECK(geometry.size() == 10, op,
             ": geometry is kernel, stride, padding before and after, and dilation, two numbers each");
  ConvolutionArgs a{};
  std::copy_n(geometry.begin(), 2, a.kernel);
  std::copy_n(geometry.begin() + 2, 2, a.stride);
  std::copy_n(geometry.begin() + 4, 2, a.before);
  std::copy_n(geometry.begin() + 6, 2, a.after);
  std::copy_n(geometry.begin() + 8, 2, a.dilation);
  for (int d = 0; d < 2; ++d) {
    SMPQ_CHECK(a.kernel[d] > 0 && a.stride[d] > 0 && a.before[d] >= 0 && a.after[d] >= 0 && a.dilation[d] > 0, op,
               ": a number of geometry is out of range");
  }
  const int64_t parents = codes.size(0);
  a.samples = codes.size(1);
  a.height = codes.size(2);
  a.width = codes.size(3);
  a.channels = codes.size(4);
  a.rows = parent.numel();
  SMPQ_CHECK(a.channels % 4 == 0, op, ": codes have ", a.channels, " channels, no multiple of 4");
  a.depthwise = depthwise;
  const int64_t taps = a.kernel[0] * a.kernel[1];
  if (depthwise) {
    check_tensor(op, weight, "weight", ScalarType::Char, {-1, -1, taps, 16});
  } else {
    check_tensor(op, weight, "weight", ScalarType::Char, {-1, -1, taps, a.channels / 4, 16, 4});
  }
  a.outs = weight.size(1);
  check_tensor(op, parent, "parent", ScalarType::Long, {a.rows});
  check_tensor(op, variant, "variant", ScalarType::Long, {a.rows});
  check_tensor(op, padding, "padding", ScalarType::Byte, {parents});
  check_tensor(op, start, "start", ScalarType::Int, {a.rows, a.outs * 16});
  SMPQ_CHECK(scale.dim() == 2, op, ": scale ", shape_of(scale), " must be [rows, channels]");
  const int64_t channels = scale.size(1);
  SMPQ_CHECK((channels + 15) / 16 == a.outs, op, ": scale has ", channels, " channels, weight ", a.outs,
             " blocks of 16");
  SMPQ_CHECK(!depthwise || (a.channels + 15) / 16 == a.outs, op, ": weight does not fit the channels of codes");
  check_indices(op, parent, "parent", parents);
  check_indices(op, variant, "variant", weight.size(0));
  const int64_t size[] = {a.height, a.width};
  int64_t out[2];
  for (int d = 0; d < 2; ++d) {
    const int64_t room = size[d] + a.before[d] + a.after[d] - a.dilation[d] * (a.kernel[d] - 1) - 1;
    SMPQ_CHECK(room >= 0, op, ": the kernel is larger than the padded codes ", shape_of(codes));
    out[d] = room / a.stride[d] + 1;
  }
  a.out_height = out[0];
  a.out_width = out[1];
  const Normalization normalization(op, codes, norm, eps, a.rows, channels, scale, bias);
  EpilogueTensors made =
      make_epilogue(op, codes, a.rows, {a.samples, a.out_height, a.out_width}, channels, normalization.scale,
                    normalization.bias, residual, residual_row, low, high, values, child_row, child_grid);
  made.out.insert(made.out.begin() + 1, normalization.statistics);
  a.epilogue = made.epilogue;
  a.codes = data<uint8_t>(codes);
  a.weight = data<int8_t>(weight);
  a.padding = data<uint8_t>(padding);
  a.start = data<int32_t>(start);
  a.parent = data<int64_t>(parent);
  a.variant = data<int64_t>(variant);
  if (norm) {
    run_normalized(a, codes, normalization);
    return made.out;
  }
  torch::stable::parallel_for(0, a.rows * a.samples, 1,
                              [&](int64_t first, int64_t last) { SMPQ_ON_CPU(coalition_convolution, a, first, last); });
  return made.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(SMPQ_LIBRARY, m) {
  m.def(
      "coalition_convolution(Tensor codes, Tensor padding, Tensor weight, Tensor start, Tensor parent, Tensor variant, "
      "Tensor scale, Tensor bias, Tensor? norm, float eps, Tensor? residual, Tensor? residual_row, float low, float "
      "high, SymInt[] geometry, "
      "bool depthwise, bool values, Tensor[] child_row, Tensor[] child_grid) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(SMPQ_LIBRARY, CPU, m) { m.impl("coalition_convolution", TORCH_BOX(&coalition_convolution)); }

}  // namespace smpq
