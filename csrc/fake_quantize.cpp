// fake_quantize and its gradient: schema, checks, and the way from tensors to the kernel's arguments.
#include "tensor.h"

namespace smpq {
namespace {

struct Call {
  Tensor x, scale;
  OptionalTensor zero_point, quant_min, quant_max;
  Shape3 shape;
};

Tensor parameter(const char* op, const char* name, const Tensor& p, const Tensor& x, const Tensor& scale) {
  SMPQ_CHECK(p.numel() == scale.numel(), op, ": ", name, " has shape ", shape_of(p), ", scale has ", shape_of(scale),
             "; they must have as many entries");
  SMPQ_CHECK(same_device(p, x), op, ": ", name, " is on another device than x");
  return torch::stable::contiguous(p);
}

Call check(const char* op, const Tensor& x, const Tensor& scale, const OptionalTensor& zero_point,
           const OptionalTensor& quant_min, const OptionalTensor& quant_max, int64_t bound_min, int64_t bound_max,
           std::optional<int64_t> axis, std::optional<int64_t> group_size) {
  Call call;
  if (group_size) {
    SMPQ_CHECK(x.dim() > 0, op, ": group_size needs an x of at least one dimension");
    const int64_t last = x.dim() - 1;
    SMPQ_CHECK(!axis || wrap_axis(*axis, x.dim(), op) == last, op, ": groups run along the last dimension of x");
    SMPQ_CHECK(*group_size > 0 && x.size(last) % *group_size == 0, op, ": group_size ", *group_size,
               " does not divide the ", x.size(last), " elements of that dimension; choose a divisor, or pad x");
    bool fits = scale.dim() == x.dim() && scale.size(last) == x.size(last) / *group_size;
    for (int64_t d = 0; fits && d < last; ++d) fits = scale.size(d) == x.size(d);
    SMPQ_CHECK(fits, op, ": scale ", shape_of(scale), " must be x ", shape_of(x), " with ", x.size(last) / *group_size,
               " groups in place of its last dimension");
    call.x = torch::stable::contiguous(x);
    call.shape = {1, x.numel() / *group_size, *group_size};
  } else {
    call.x = dense(x);
    if (axis) {
      axis = wrap_axis(*axis, x.dim(), op);
      SMPQ_CHECK(scale.numel() == x.size(*axis), op, ": scale has ", scale.numel(), " entries, x ", shape_of(x),
                 " has ", x.size(*axis), " channels along axis ", *axis);
    } else {
      SMPQ_CHECK(scale.numel() == 1, op, ": scale has ", scale.numel(),
                 " entries; name the axis (or the group_size) that they run along");
    }
    call.shape = shape3(call.x, axis);
  }
  SMPQ_CHECK(same_device(scale, x), op, ": scale is on another device than x");
  call.scale = torch::stable::contiguous(scale);
  if (zero_point) call.zero_point = parameter(op, "zero_point", *zero_point, x, scale);
  for (auto [name, bound, mine] :
       {std::tuple{"quant_min", &quant_min, &call.quant_min}, std::tuple{"quant_max", &quant_max, &call.quant_max}}) {
    if (!*bound) continue;
    SMPQ_CHECK((*bound)->scalar_type() == ScalarType::Int, op, ": ", name, " must be int32");
    *mine = parameter(op, name, **bound, x, scale);
  }
  SMPQ_CHECK(quant_min || quant_max || bound_min <= bound_max, op, ": quant_min ", bound_min,
             " is larger than quant_max ", bound_max);
  constexpr int64_t kWidest = 1 << 16;
  SMPQ_CHECK(bound_min >= -kWidest && bound_max <= kWidest, op, ": codes [", bound_min, ", ", bound_max,
             "] need more than 16 bits");
  return call;
}

template <class Kinds>
auto forward_args(const Call& call, Tensor* y, int64_t bound_min, int64_t bound_max) {
  using T = typename Kinds::T;
  using C = typename Kinds::C;
  using Z = typename Kinds::Z;
  return FakeQuantizeArgs<T, C, Z>{data<T>(call.x),
                                   y ? mutable_data<T>(*y) : nullptr,
                                   data<C>(call.scale),
                                   data<Z>(call.zero_point),
                                   data<int32_t>(call.quant_min),
                                   data<int32_t>(call.quant_max),
                                   static_cast<int32_t>(bound_min),
                                   static_cast<int32_t>(bound_max),
                                   call.shape};
}

Tensor fake_quantize(const Tensor& x, const Tensor& scale, const OptionalTensor& zero_point,
                     const OptionalTensor& quant_min, const OptionalTensor& quant_max, int64_t bound_min,
                     int64_t bound_max, std::optional<int64_t> axis, std::optional<int64_t> group_size) {
  const char* op = "fake_quantize";
  const Call call = check(op, x, scale, zero_point, quant_min, quant_max, bound_min, bound_max, axis, group_size);
  Tensor y = torch::stable::empty_like(call.x);
  dispatch(op, x, scale, zero_point, [&](auto kinds) {
    const auto args = forward_args<decltype(kinds)>(call, &y, bound_min, bound_max);
    launch(
        x, [&](void* stream) { cuda::fake_quantize(args, stream); },
        [&](int64_t first, int64_t last) { SMPQ_ON_CPU(fake_quantize, args, first, last); }, call.shape.elements(),
        1 << 15);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                                          const OptionalTensor& zero_point,
                                                          const OptionalTensor& quant_min,
                                                          const OptionalTensor& quant_max, int64_t bound_min,
                                                          int64_t bound_max, std::optional<int64_t> axis,
                                                          std::optional<int64_t> group_size, bool with_scale) {
  const char* op = "fake_quantize_backward";
  const Call call = check(op, x, scale, zero_point, quant_min, quant_max, bound_min, bound_max, axis, group_size);
  SMPQ_CHECK(grad.scalar_type() == x.scalar_type() && shape_of(grad) == shape_of(x) && same_device(grad, x), op,
             ": grad must have the dtype, shape and device of x");
  const auto strides_of = [](const Tensor& t) { return std::vector<int64_t>(t.strides().begin(), t.strides().end()); };
  const Tensor grad_dense = strides_of(grad) == strides_of(call.x) ? grad : copy_as(grad, call.x);
  Tensor grad_x = torch::stable::empty_like(call.x);
  const Shape3& s = call.shape;
  Tensor partial = with_scale ? new_float64(x, {2, s.outer, s.channels, pieces_per_run(s)}) : new_float64(x, {0});
  dispatch(op, x, scale, zero_point, [&](auto kinds) {
    using T = typename decltype(kinds)::T;
    using C = typename decltype(kinds)::C;
    using Z = typename decltype(kinds)::Z;
    const FakeQuantizeBackwardArgs<T, C, Z> args{forward_args<decltype(kinds)>(call, nullptr, bound_min, bound_max),
                                                 data<T>(grad_dense), mutable_data<T>(grad_x),
                                                 with_scale ? mutable_data<double>(partial) : nullptr};
    launch(
        x, [&](void* stream) { cuda::fake_quantize_backward(args, stream); },
        [&](int64_t first, int64_t last) { SMPQ_ON_CPU(fake_quantize_backward, args, first, last); },
        with_scale ? piece_count(s) : s.elements(),
        with_scale ? std::max<int64_t>(1, (1 << 15) / std::min(s.inner + 1, kPiece)) : 1 << 15);
  });
  if (!with_scale) return {grad_x, torch::stable::new_empty(scale, {0}), torch::stable::new_empty(scale, {0})};
  const auto total = [&](int64_t which) {
    const std::vector<int64_t> over{0, 2};
    Tensor sum = torch::stable::sum(torch::stable::select(partial, 0, which), over);
    if (x.numel() == 0) sum = torch::stable::new_zeros(partial, {scale.numel()});
    Tensor out = torch::stable::empty_like(scale);
    torch::stable::copy_(out, torch::stable::reshape(sum, scale.sizes()));
    return out;
  };
  return {grad_x, total(0), total(1)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(SMPQ_LIBRARY, m) {
  m.def(
      "fake_quantize(Tensor x, Tensor scale, Tensor? zero_point, Tensor? quant_min, Tensor? quant_max, "
      "SymInt bound_min, SymInt bound_max, SymInt? axis, SymInt? group_size) -> Tensor");
  m.def(
      "fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, Tensor? zero_point, Tensor? quant_min, "
      "Tensor? quant_max, SymInt bound_min, SymInt bound_max, SymInt? axis, SymInt? group_size, bool with_scale) "
      "-> (Tensor, Tensor, Tensor)");
}

SMPQ_REGISTER("fake_quantize", fake_quantize)
SMPQ_REGISTER("fake_quantize_backward", fake_quantize_backward)

}  // namespace smpq
