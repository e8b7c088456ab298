// quantization_error: schema, checks, and the way from tensors to the kernel's arguments.
#include "tensor.h"

namespace smpq {
namespace {

Tensor quantization_error(const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point,
                          const Tensor& quant_min, const Tensor& quant_max, std::optional<int64_t> axis) {
  const char* op = "quantization_error";
  if (axis) axis = wrap_axis(*axis, x.dim(), op);
  SMPQ_CHECK(scale.dim() == (axis ? 2 : 1), op, ": scale ", shape_of(scale), " must be ",
             axis ? "[candidates, channels]" : "[candidates], or name the axis of its channels");
  SMPQ_CHECK(!axis || scale.size(1) == x.size(*axis), op, ": scale has ", axis ? scale.size(1) : 1, " channels, x ",
             shape_of(x), " has ", axis ? x.size(*axis) : 1, " along axis ", axis.value_or(0));
  SMPQ_CHECK(!zero_point || shape_of(*zero_point) == shape_of(scale), op, ": zero_point must have the shape of scale ",
             shape_of(scale));
  const int64_t candidates = scale.size(0);
  for (const Tensor* bound : {&quant_min, &quant_max}) {
    SMPQ_CHECK(bound->scalar_type() == ScalarType::Int && bound->numel() == candidates && same_device(*bound, x), op,
               ": quant_min and quant_max must be int32 [candidates] on the device of x");
  }
  SMPQ_CHECK(same_device(scale, x) && (!zero_point || same_device(*zero_point, x)), op,
             ": all arguments must be on the device of x");

  Tensor input = dense(x);
  Shape3 shape = shape3(input, axis);
  constexpr int64_t kShortRun = 64;
  if (shape.channels > 1 && shape.inner < kShortRun && shape.outer > 1) {  // channels-last: bring channels to the front
    input = torch::stable::contiguous(torch::stable::transpose(input, 0, *axis));
    shape = {1, shape.channels, x.numel() / shape.channels};
  }
  const Tensor scales = torch::stable::contiguous(scale);
  const Tensor low = torch::stable::contiguous(quant_min), high = torch::stable::contiguous(quant_max);
  std::optional<Tensor> zeros;
  if (zero_point) zeros = torch::stable::contiguous(*zero_point);
  const Tensor partial = new_float64(x, {candidates, shape.outer, shape.channels, pieces_per_run(shape)});
  dispatch(op, x, scale, zero_point, [&](auto kinds) {
    using T = typename decltype(kinds)::T;
    using C = typename decltype(kinds)::C;
    using Z = typename decltype(kinds)::Z;
    const QuantizationErrorArgs<T, C, Z> args{data<T>(input),     data<C>(scales),     data<Z>(zeros),
                                              data<int32_t>(low), data<int32_t>(high), mutable_data<double>(partial),
                                              candidates,         shape.channels > 1,  shape};
    launch(
        x, [&](void* stream) { cuda::quantization_error(args, stream); },
        [&](int64_t first, int64_t last) { SMPQ_ON_CPU(quantization_error, args, first, last); }, piece_count(shape),
        std::max<int64_t>(1, (1 << 14) / std::min(shape.inner + 1, kPiece)));
  });
  const std::vector<int64_t> over{1, 3};
  const Tensor sum =
      x.numel() == 0 ? torch::stable::new_zeros(partial, scale.sizes()) : torch::stable::sum(partial, over);
  const Tensor out = torch::stable::new_empty(scale, scale.sizes(), ScalarType::Float);
  Tensor result = out;
  torch::stable::copy_(result, torch::stable::reshape(sum, scale.sizes()));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(SMPQ_LIBRARY, m) {
  m.def(
      "quantization_error(Tensor x, Tensor scale, Tensor? zero_point, Tensor quant_min, Tensor quant_max, "
      "SymInt? axis) -> Tensor");
}

SMPQ_REGISTER("quantization_error", quantization_error)

}  // namespace smpq
