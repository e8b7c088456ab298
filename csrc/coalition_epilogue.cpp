// coalition_epilogue: schema, checks, and the way from tensors to the kernel's arguments.
#include "epilogue.h"
#include "normalization.h"

namespace smpq {
namespace {

std::vector<Tensor> coalition_epilogue(const Tensor& x, const Tensor& parent, const OptionalTensor& scale,
                                       const OptionalTensor& bias, const OptionalTensor& norm, double eps,
                                       const OptionalTensor& residual, const OptionalTensor& residual_row, double low,
                                       double high, bool values, const std::vector<Tensor>& child_row,
                                       const std::vector<Tensor>& child_grid, std::vector<int64_t> child_bits) {
  const char* op = "coalition_epilogue";
  check_tensor(op, x, x, "x", ScalarType::Float, {-1, -1, -1, -1, -1});
  const int64_t rows = parent.numel();
  check_tensor(op, x, parent, "parent", ScalarType::Long, {rows});
  check_indices(op, parent, "parent", x.size(0));
  const Normalization normalization(op, x, norm, eps, rows, x.size(4), scale, bias);
  EpilogueTensors made =
      make_epilogue(op, x, rows, {x.size(1), x.size(2), x.size(3)}, x.size(4), normalization.scale, normalization.bias,
                    residual, residual_row, low, high, values, child_row, child_grid, child_bits);
  const EpilogueArgs args{data<float>(x), data<int64_t>(parent), 0, rows, made.epilogue};
  made.out.insert(made.out.begin() + 1, normalization.statistics);
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
      "residual, Tensor? residual_row, float low, float high, bool values, Tensor[] child_row, Tensor[] child_grid, "
      "SymInt[] child_bits) -> "
      "Tensor[]");
}

SMPQ_REGISTER("coalition_epilogue", coalition_epilogue)

}  // namespace smpq
