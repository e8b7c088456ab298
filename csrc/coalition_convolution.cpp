// coalition_convolution: schema, checks, and the way from tensors to the kernel's arguments.
#include "epilogue.h"
#include "normalization.h"

namespace smpq {
namespace {

constexpr const char* op = "coalition_convolution";

template <class X>
constexpr ScalarType kType = std::is_same_v<X, float>     ? ScalarType::Float
                             : std::is_same_v<X, int32_t> ? ScalarType::Int
                             : std::is_same_v<X, int16_t> ? ScalarType::Short
                             : std::is_same_v<X, int8_t>  ? ScalarType::Char
                                                          : ScalarType::Byte;

// Rows [first_row, last_row).
template <class X>
void multiply(const Tensor& like, const ConvolutionArgs<X>& a, int64_t last_row) {
  const int64_t start = a.first_row * a.samples;
  launch(
      like, [&](void* stream) { cuda::coalition_convolution(a, last_row, stream); },
      [&](int64_t first, int64_t last) { SMPQ_ON_CPU(coalition_convolution, a, start + first, start + last); },
      last_row * a.samples - start, 1);
}

// Products first, while a cache holds them, and the rest by each row's own statistics.
template <class X>
void multiply_normalized(const Tensor& like, ConvolutionArgs<X> a, const Normalization& norm) {
  const Epilogue& e = a.epilogue;
  const int64_t group = norm.rows_together(e, a.rows);
  const Tensor products = torch::stable::new_empty(norm.statistics, {group * e.pixels * e.channels}, ScalarType::Float);
  a.products = mutable_data<float>(products);
  norm.run(EpilogueArgs{a.products, nullptr, 0, a.rows, e}, on_device(like) ? cuda::moment_parts(e) : a.samples,
           [&](const EpilogueArgs& args, int64_t last, double* to) {
             a.first_row = args.first_row;
             a.moments = to;
             multiply(like, a, last);  // the CPU takes the moments while it writes the products
             if (on_device(like)) Normalization::moments(like, args, last, to);
           });
}

template <class X>
std::vector<Tensor> run(const Tensor& x, const Tensor& padding, const Tensor& weight, const Tensor& start,
                        const Tensor& parent, const Tensor& variant, const Tensor& scale, const Tensor& bias,
                        const OptionalTensor& norm, double eps, const OptionalTensor& residual,
                        const OptionalTensor& residual_row, bool multiplies, double low, double high,
                        int64_t activation, std::vector<int64_t> geometry, bool depthwise, bool values,
                        const std::vector<Tensor>& child_row, const std::vector<Tensor>& child_grid,
                        std::vector<int64_t> child_bits) {
  using Args = ConvolutionArgs<X>;
  using Weight = typename Args::Weight;
  using Sum = typename Args::Sum;
  constexpr int64_t together = Multiplied<X>::together;
  check_tensor(op, x, x, "x", kType<X>, {-1, -1, -1, -1, -1});
  SMPQ_CHECK(geometry.size() == 10, op,
             ": geometry is kernel, stride, padding before and after, and dilation, two numbers each");
  Args a{};
  std::copy_n(geometry.begin(), 2, a.kernel);
  std::copy_n(geometry.begin() + 2, 2, a.stride);
  std::copy_n(geometry.begin() + 4, 2, a.before);
  std::copy_n(geometry.begin() + 6, 2, a.after);
  std::copy_n(geometry.begin() + 8, 2, a.dilation);
  for (int d = 0; d < 2; ++d) {
    SMPQ_CHECK(a.kernel[d] > 0 && a.stride[d] > 0 && a.before[d] >= 0 && a.after[d] >= 0 && a.dilation[d] > 0, op,
               ": a number of geometry is out of range");
  }
  const int64_t parents = x.size(0);
  a.samples = x.size(1);
  a.height = x.size(2);
  a.width = x.size(3);
  a.channels = x.size(4);
  a.rows = parent.numel();
  SMPQ_CHECK(a.channels % together == 0, op, ": x has ", a.channels, " channels, no multiple of ", together);
  a.depthwise = depthwise;
  const int64_t taps = a.kernel[0] * a.kernel[1];
  if (depthwise) {
    check_tensor(op, x, weight, "weight", kType<Weight>, {-1, -1, taps, 16});
  } else {
    check_tensor(op, x, weight, "weight", kType<Weight>, {-1, -1, taps, -1, 16, together});
  }
  a.outs = weight.size(1);
  a.depth = depthwise ? a.channels : weight.size(3) * together;
  const int64_t groups = a.depth > 0 ? a.channels / a.depth : 0;
  SMPQ_CHECK(a.channels > 0 && groups * a.depth == a.channels && a.outs % groups == 0, op, ": weight ",
             shape_of(weight), " sees ", a.depth, " channels, x has ", a.channels);
  check_tensor(op, x, parent, "parent", ScalarType::Long, {a.rows});
  check_tensor(op, x, variant, "variant", ScalarType::Long, {a.rows});
  check_tensor(op, x, padding, "padding", kType<X>, {parents});
  check_tensor(op, x, start, "start", kType<Sum>, {a.rows, a.outs * 16});
  SMPQ_CHECK(scale.dim() == 2, op, ": scale ", shape_of(scale), " must be [rows, channels]");
  const int64_t channels = scale.size(1);
  SMPQ_CHECK((channels + 15) / 16 == a.outs, op, ": scale has ", channels, " channels, weight ", a.outs,
             " blocks of 16");
  SMPQ_CHECK(channels > 0, op, ": there are no channels");
  SMPQ_CHECK(groups == 1 || channels == a.outs * 16, op, ": groups have a multiple of 16 channels, scale has ",
             channels);
  const int64_t own = together > 1 ? (channels + 3) / 4 * 4 : channels;
  SMPQ_CHECK(!depthwise || a.channels == own, op, ": x has ", a.channels, " channels, scale ", channels,
             ", and a depthwise layer needs ", own);
  for (const Tensor* t : {&x, &weight}) {
    SMPQ_CHECK(!on_device(x) || reinterpret_cast<uintptr_t>(t->const_data_ptr()) % 4 == 0, op,
               ": on CUDA x and weight must start at a multiple of four bytes");
  }
  check_indices(op, parent, "parent", parents);
  check_indices(op, variant, "variant", weight.size(0));
  a.group_outs = a.outs / groups;
  const int64_t size[] = {a.height, a.width};
  int64_t out[2];
  for (int d = 0; d < 2; ++d) {
    const int64_t room = size[d] + a.before[d] + a.after[d] - a.dilation[d] * (a.kernel[d] - 1) - 1;
    SMPQ_CHECK(room >= 0, op, ": the kernel is larger than the padded x ", shape_of(x));
    out[d] = room / a.stride[d] + 1;
  }
  a.out_height = out[0];
  a.out_width = out[1];
  const Normalization normalization(op, x, norm, eps, a.rows, channels, scale, bias);
  EpilogueTensors made = make_epilogue(op, x, a.rows, {a.samples, a.out_height, a.out_width}, channels,
                                       normalization.scale, normalization.bias, residual, residual_row, multiplies, low,
                                       high, activation, values, child_row, child_grid, child_bits);
  made.out.insert(made.out.begin() + 1, normalization.statistics);
  a.epilogue = made.epilogue;
  a.x = data<X>(x);
  a.weight = data<Weight>(weight);
  a.padding = data<X>(padding);
  a.start = data<Sum>(start);
  a.parent = data<int64_t>(parent);
  a.variant = data<int64_t>(variant);
  norm ? multiply_normalized(x, a, normalization) : multiply(x, a, a.rows);
  return made.out;
}

std::vector<Tensor> coalition_convolution(const Tensor& x, const Tensor& padding, const Tensor& weight,
                                          const Tensor& start, const Tensor& parent, const Tensor& variant,
                                          const Tensor& scale, const Tensor& bias, const OptionalTensor& norm,
                                          double eps, const OptionalTensor& residual,
                                          const OptionalTensor& residual_row, bool multiplies, double low, double high,
                                          int64_t activation, std::vector<int64_t> geometry, bool depthwise,
                                          bool values, const std::vector<Tensor>& child_row,
                                          const std::vector<Tensor>& child_grid, std::vector<int64_t> child_bits) {
  const auto of_type = x.scalar_type() == ScalarType::Float   ? run<float>
                       : x.scalar_type() == ScalarType::Short ? run<int16_t>
                                                              : run<uint8_t>;
  return of_type(x, padding, weight, start, parent, variant, scale, bias, norm, eps, residual, residual_row, multiplies,
                 low, high, activation, geometry, depthwise, values, child_row, child_grid, child_bits);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(SMPQ_LIBRARY, m) {
  m.def(
      "coalition_convolution(Tensor x, Tensor padding, Tensor weight, Tensor start, Tensor parent, Tensor variant, "
      "Tensor scale, Tensor bias, Tensor? norm, float eps, Tensor? residual, Tensor? residual_row, bool "
      "multiplies, float low, float high, SymInt activation, SymInt[] geometry, bool depthwise, bool values, Tensor[] "
      "child_row, Tensor[] child_grid, SymInt[] child_bits) -> Tensor[]");
}

SMPQ_REGISTER("coalition_convolution", coalition_convolution)

}  // namespace smpq
