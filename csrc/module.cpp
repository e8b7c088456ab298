// The Python module `_C`. Loading it registers the ops; it also tells how it was built.
#include <pybind11/pybind11.h>

#include <string>

#include "kernels.h"

namespace py = pybind11;

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
}
