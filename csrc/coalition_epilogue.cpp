// coalition_epilogue: schema, checks, and the way from tensors to the kernel's arguments.
#include "epilogue.h"

namespace smpq {
namespace {

std::vector<Tensor> coalition_epilogue(const Tensor& x, const Tensor& parent, const OptionalTensor& scale,
                                       const OptionalTensor& bias, const OptionalTensor& norm, double eps,
                                       const OptionalTensor& residual, const OptionalTensor& residual_row, double low,
                                       double high, bool values, const std::vector<Tensor>& child_row,
                                       const std::vector<Tensor>& child_grid, std::vector<int64_t> child_bits) {
  const char* op = "coalition_epilogue";
  check_tensor(op, x, "x", ScalarType::Float, {-1, -1, -1, -1, -1});
  const int64_t rows = parent.numel();
  check_tensor(op, parent, "parent", ScalarType::Long, {rows});
  check_indices(op, parent, "parent", x.size(0));
  const Normalization normalization(op, x, norm, eps, rows, x.size(4), scale, bias);
  EpilogueTensors made =
      make_epilogue(op, x, rows, {x.size(1), x.size(2), x.size(3)}, x.size(4), normalization.scale, normalization.bias,
                    residual, residual_row, low, high, values, child_row, child_grid, child_bits);
  const EpilogueArgs args{data<float>(x), data<int64_t>(parent), rows, made.epilogue};
  made.out.insert(made.out.begin() + 1, normalization.statistics);
  const auto finish = [&](int64_t first, int64_t last) { finish_rows(args, first, last); };
  if (!norm) {
    finish(0, rows);
    return made.out;
  }
  const int64_t units = cpu::epilogue_units(args.epilogue);
  const auto moments = [&](int64_t first_row, int64_t last_row, double* to) {
    torch::stable::parallel_for(0, (last_row - first_row) * units, 4, [&](int64_t first, int64_t last) {
      SMPQ_ON_CPU(coalition_moments, args, first_row, to, first, last);
    });
  };
  normalization.run(args.epilogue, rows, units, moments, finish);
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

STABLE_TORCH_LIBRARY_IMPL(SMPQ_LIBRARY, CPU, m) { m.impl("coalition_epilogue", TORCH_BOX(&coalition_epilogue)); }

}  // namespace smpq
