// coalition_fake_quantize, of one tensor or of a list in one launch: schema, checks, and the kernel's arguments.
#include <numeric>

#include "tensor.h"

namespace smpq {
namespace {

struct Call {
  Tensor x, y, scale, quant_min, quant_max, mixtures;
  OptionalTensor zero_point, parent;
  Shape3 shape;
  int64_t parents;
  bool per_channel;
};

// The strides of one row of x, kept in y: [n, *row].
Tensor new_rows(const Tensor& x, const Tensor& row, int64_t n) {
  std::vector<int64_t> order = *memory_order(row), size{n}, restore(row.dim() + 1);
  for (int64_t d = 0; d < row.dim(); ++d) {
    if (row.size(d) == 1) order.push_back(d);
  }
  restore[0] = 0;
  for (size_t k = 0; k < order.size(); ++k) {
    size.push_back(row.size(order[k]));
    restore[order[k] + 1] = static_cast<int64_t>(k) + 1;
  }
  const Tensor y = torch::stable::new_empty(x, size);
  std::array<StableIValue, 2> stack{torch::stable::detail::from(y), torch::stable::detail::from(restore)};
  succeeds(torch_call_dispatcher("aten::permute", "", stack.data(), TORCH_ABI_VERSION), "a permuted tensor");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Call check(const char* op, const Tensor& x, const Tensor& scale, const OptionalTensor& zero_point,
           const Tensor& quant_min, const Tensor& quant_max, const Tensor& mixtures, std::optional<int64_t> axis,
           const OptionalTensor& parent) {
  Call call;
  const int64_t row_dims = x.dim() - (parent ? 1 : 0);
  SMPQ_CHECK(row_dims >= 0, op, ": with parent, x needs a leading dimension of parents");
  call.parents = parent ? x.size(0) : 1;
  Tensor row = parent ? (call.parents ? torch::stable::select(x, 0, 0) : torch::stable::new_empty(x, {0})) : x;
  call.x = x;
  if (parent && call.parents && x.numel()) {
    const bool rows_dense = memory_order(row) && (call.parents == 1 || x.stride(0) == row.numel());
    if (!rows_dense) {
      call.x = torch::stable::contiguous(x);
      row = torch::stable::select(call.x, 0, 0);
    }
  } else if (!parent) {
    call.x = row = dense(x);
  }
  if (axis) axis = wrap_axis(*axis, row_dims, op);
  SMPQ_CHECK(scale.dim() == (axis ? 2 : 1), op, ": scale ", shape_of(scale), " must be ",
             axis ? "[candidates, channels]" : "[candidates], or name the axis of its channels");
  const int64_t candidates = scale.size(0);
  SMPQ_CHECK(!axis || call.parents == 0 || scale.size(1) == row.size(*axis), op, ": scale has ",
             axis ? scale.size(1) : 1, " channels, a row of x ", shape_of(row), " has another number along axis ",
             axis.value_or(0));
  SMPQ_CHECK(mixtures.dim() == 2 && mixtures.size(1) == candidates, op, ": mixtures ", shape_of(mixtures),
             " must be [n, ", candidates, "], a weight for each candidate");
  SMPQ_CHECK(mixtures.scalar_type() == scale.scalar_type(), op, ": mixtures must have the dtype of scale");
  for (const Tensor* bound : {&quant_min, &quant_max}) {
    SMPQ_CHECK(bound->scalar_type() == ScalarType::Int && bound->numel() == candidates, op,
               ": quant_min and quant_max must be int32 [candidates]");
  }
  for (const Tensor* other : {&scale, &quant_min, &quant_max, &mixtures}) {
    SMPQ_CHECK(same_device(*other, x), op, ": all arguments must be on the device of x");
  }
  if (zero_point) {
    SMPQ_CHECK(shape_of(*zero_point) == shape_of(scale) && same_device(*zero_point, x), op, ": zero_point ",
               shape_of(*zero_point), " must have the shape and device of scale ", shape_of(scale));
    call.zero_point = torch::stable::contiguous(*zero_point);
  }
  if (parent) {
    SMPQ_CHECK(parent->scalar_type() == ScalarType::Long && parent->dim() == 1 && parent->numel() == mixtures.size(0) &&
                   same_device(*parent, x),
               op, ": parent must be int64 [n] on the device of x, with an entry for each row of mixtures");
    SMPQ_CHECK(call.parents > 0 || parent->numel() == 0, op, ": x holds no parent");
    call.parent = torch::stable::contiguous(*parent);
  }
  call.scale = torch::stable::contiguous(scale);
  call.quant_min = torch::stable::contiguous(quant_min);
  call.quant_max = torch::stable::contiguous(quant_max);
  call.mixtures = torch::stable::contiguous(mixtures);
  call.per_channel = axis.has_value() && scale.size(1) != 1;
  call.shape = shape3(row, axis);
  if (row.numel() == 0) {
    std::vector<int64_t> size{mixtures.size(0)};
    for (int64_t d = parent ? 1 : 0; d < x.dim(); ++d) size.push_back(x.size(d));
    call.y = torch::stable::new_empty(x, size);
  } else {
    call.y = new_rows(x, row, mixtures.size(0));
  }
  return call;
}

template <class Kinds>
auto arguments(const Call& call) {
  using T = typename Kinds::T;
  using C = typename Kinds::C;
  using Z = typename Kinds::Z;
  return CoalitionArgs<T, C, Z>{data<T>(call.x),
                                mutable_data<T>(call.y),
                                data<C>(call.scale),
                                data<Z>(call.zero_point),
                                data<int32_t>(call.quant_min),
                                data<int32_t>(call.quant_max),
                                data<C>(call.mixtures),
                                data<int64_t>(call.parent),
                                call.mixtures.size(0),
                                call.parents,
                                call.scale.size(0),
                                call.per_channel,
                                call.shape};
}

// The rows that descend from each parent: children[begin[p] .. begin[p + 1]).
struct Family {
  std::vector<int64_t> begin, children;
};

template <class Args>
Family family(const char* op, const Args& args) {
  Family f{std::vector<int64_t>(args.parents + 1), std::vector<int64_t>(args.rows)};
  const auto parent = [&](int64_t row) { return args.parent ? args.parent[row] : 0; };
  for (int64_t row = 0; row < args.rows; ++row) {
    const int64_t p = parent(row);
    SMPQ_CHECK(p >= 0 && p < args.parents, op, ": parent[", row, "] is ", p, ", x holds ", args.parents, " parents");
    ++f.begin[p + 1];
  }
  std::partial_sum(f.begin.begin(), f.begin.end(), f.begin.begin());
  std::vector<int64_t> next(f.begin.begin(), f.begin.end() - 1);
  for (int64_t row = 0; row < args.rows; ++row) f.children[next[parent(row)]++] = row;
  return f;
}

template <class Kinds>
void run([[maybe_unused]] const char* op, const std::vector<Call>& calls) {
  using Args = CoalitionArgs<typename Kinds::T, typename Kinds::C, typename Kinds::Z>;
  std::vector<Args> all;
  for (const Call& call : calls) {
    if (call.y.numel()) all.push_back(arguments<Kinds>(call));
  }
  if (all.empty()) return;
  const auto on_device = [&](void* stream) {
    cuda::coalition_fake_quantize(all.data(), static_cast<int64_t>(all.size()), stream);
  };
#ifndef SMPQ_EMULATE
  if (!calls.front().x.is_cuda()) {
    std::vector<Family> families;
    std::vector<int64_t> first{0};  // the first unit of each tensor
    for (const Args& args : all) {
      families.push_back(family(op, args));
      first.push_back(first.back() + args.parents * cpu::coalition_blocks(args.shape));
    }
    torch::stable::parallel_for(0, first.back(), 16, [&](int64_t begin, int64_t end) {
      for (size_t k = 0; k < all.size(); ++k) {
        const int64_t from = std::max(begin, first[k]) - first[k], to = std::min(end, first[k + 1]) - first[k];
        if (from >= to) continue;
        SMPQ_ON_CPU(coalition_fake_quantize, all[k], families[k].begin.data(), families[k].children.data(), from, to);
      }
    });
    return;
  }
#endif
  launch(calls.front().x, on_device, [](int64_t, int64_t) {}, 0, 1);
}

Tensor coalition_fake_quantize(const Tensor& x, const Tensor& scale, const OptionalTensor& zero_point,
                               const Tensor& quant_min, const Tensor& quant_max, const Tensor& mixtures,
                               std::optional<int64_t> axis, const OptionalTensor& parent) {
  const char* op = "coalition_fake_quantize";
  const std::vector<Call> calls{check(op, x, scale, zero_point, quant_min, quant_max, mixtures, axis, parent)};
  dispatch(op, x, scale, zero_point, [&](auto kinds) { run<decltype(kinds)>(op, calls); });
  return calls.front().y;
}

std::vector<Tensor> coalition_fake_quantize_list(const std::vector<Tensor>& x, const std::vector<Tensor>& scale,
                                                 const std::vector<Tensor>& zero_point,
                                                 const std::vector<Tensor>& quant_min,
                                                 const std::vector<Tensor>& quant_max,
                                                 const std::vector<Tensor>& mixtures, std::optional<int64_t> axis) {
  const char* op = "coalition_fake_quantize_list";
  const bool zeros = zero_point.empty();
  for (const auto* list : {&scale, &quant_min, &quant_max, &mixtures}) {
    SMPQ_CHECK(list->size() == x.size(), op, ": every list must have as many entries as x, ", x.size());
  }
  SMPQ_CHECK(zeros || zero_point.size() == x.size(), op, ": zero_point must be empty or as long as x");
  std::vector<Call> calls;
  std::vector<Tensor> out;
  for (size_t k = 0; k < x.size(); ++k) {
    SMPQ_CHECK(x[k].scalar_type() == x[0].scalar_type() && same_device(x[k], x[0]) &&
                   scale[k].scalar_type() == scale[0].scalar_type() &&
                   (zeros || zero_point[k].scalar_type() == zero_point[0].scalar_type()),
               op, ": all tensors must share one dtype and device; entry ", k, " does not");
    const OptionalTensor zero = zeros ? OptionalTensor{} : OptionalTensor{zero_point[k]};
    calls.push_back(check(op, x[k], scale[k], zero, quant_min[k], quant_max[k], mixtures[k], axis, std::nullopt));
    out.push_back(calls.back().y);
  }
  if (calls.empty()) return out;
  dispatch(op, x[0], scale[0], calls[0].zero_point, [&](auto kinds) { run<decltype(kinds)>(op, calls); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(SMPQ_LIBRARY, m) {
  m.def(
      "coalition_fake_quantize(Tensor x, Tensor scale, Tensor? zero_point, Tensor quant_min, Tensor quant_max, "
      "Tensor mixtures, SymInt? axis, Tensor? parent) -> Tensor");
  m.def(
      "coalition_fake_quantize_list(Tensor[] x, Tensor[] scale, Tensor[] zero_point, Tensor[] quant_min, "
      "Tensor[] quant_max, Tensor[] mixtures, SymInt? axis) -> Tensor[]");
}

SMPQ_REGISTER("coalition_fake_quantize", coalition_fake_quantize)
SMPQ_REGISTER("coalition_fake_quantize_list", coalition_fake_quantize_list)

}  // namespace smpq
