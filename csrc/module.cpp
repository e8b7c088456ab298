// The Python module `_C`. Loading it registers the ops; it also tells how it was built, and plans coalitions.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "planner.h"

namespace py = pybind11;

namespace {

using Choices = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

py::array_t<int64_t> array(const std::vector<int64_t>& v) {
  return py::array_t<int64_t>(static_cast<py::ssize_t>(v.size()), v.data());
}

// places: (inputs, columns) each; returns (row [n], coalition [rows]) for each place.
py::list plan(const std::vector<std::pair<std::vector<int64_t>, std::vector<int64_t>>>& places,
              const Choices& choices) {
  if (choices.ndim() != 2) throw std::invalid_argument("choices: expected [n, columns]");
  std::vector<smpq::Place> given;
  for (const auto& [inputs, columns] : places) given.push_back({inputs, columns});
  py::list out;
  for (const auto& p : smpq::plan(given, choices.data(), choices.shape(0), choices.shape(1))) {
    out.append(py::make_tuple(array(p.row), array(p.coalition)));
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled half of smpq_ext: importing it registers torch.ops.smpq.*";
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = SMPQ_COMPILER;
    info["torch"] = SMPQ_TORCH;
    info["cuda"] = SMPQ_CUDA_VERSION;
    info["cuda_architectures"] = SMPQ_CUDA_ARCHITECTURES;
    info["cpu_kernels"] = std::string(smpq::cpu::isa_name());
    return info;
  });
  m.def("plan", &plan, py::arg("places"), py::arg("choices"));
}
