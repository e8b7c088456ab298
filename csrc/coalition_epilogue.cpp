// coalition_epilogue: schema, checks, and the way from tensors to the kernel's arguments.
#include "epilogue.h"
#include "normalization.h"

namespace smpq {
namespace {

std::vector<Tensor> coalition_epilogue(const Tensor& x, const Tensor& parent, const OptionalTensor& scale,
                                       const OptionalTensor& bias, const OptionalTensor& norm, double eps,
                                       const OptionalTensor& residual, const OptionalTensor& residual_row,
                                       bool multiplies, double low, double high, int64_t activation, bool values,
                                       bool find_nan, const std::vector<Tensor>& child_row,
                                       const std::vector<Tensor>& child_grid, std::vector<int64_t> child_bits) {
  const char* op = "coalition_epilogue";
  check_tensor(op, x, x, "x", ScalarType::Float, {-1, -1, -1, -1, -1});
  const int64_t rows = parent.numel();
  check_tensor(op, x, parent, "parent", ScalarType::Long, {rows});
  check_indices(op, parent, "parent", x.size(0));
  const Normalization normalization(op, x, norm, eps, rows, x.size(4), scale, bias);
  EpilogueTensors made = make_epilogue(op, x, rows, {x.size(1), x.size(2), x.size(3)}, x.size(4), normalization.scale,
                                       normalization.bias, residual, residual_row, multiplies, low, high, activation,
                                       values, child_row, child_grid, child_bits);
  Tensor broken = torch::stable::new_empty(x, {find_nan ? rows : 0, x.size(1)}, ScalarType::Bool);
  torch::stable::fill_(broken, 0.0);
  made.out.insert(made.out.begin() + 1, {normalization.statistics, broken});
  const EpilogueArgs args{data<float>(x),
                          data<int64_t>(parent),
                          0,
                          rows,
                          made.epilogue,
                          find_nan ? mutable_data<bool>(broken) : nullptr,
                          x.size(2) * x.size(3)};
  if (norm) {
    normalization.run(
        args, Normalization::moment_parts(x, made.epilogue),
        [&](const EpilogueArgs& group, int64_t last, double* to) { Normalization::moments(x, group, last, to); });
  } else {
    Normalization::finish_rows(x, args, rows);
  }
  return made.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(SMPQ_LIBRARY, m) {
  m.def(
      "coalition_epilogue(Tensor x, Tensor parent, Tensor? scale, Tensor? bias, Tensor? norm, float eps, Tensor? "
      "residual, Tensor? residual_row, bool multiplies, float low, float high, SymInt activation, bool values, bool "
      "find_nan, Tensor[] child_row, Tensor[] child_grid, SymInt[] child_bits) -> Tensor[]");
}

SMPQ_REGISTER("coalition_epilogue", coalition_epilogue)

}  // namespace smpq
