// Which of the compiled instruction sets this processor runs.
#include <cstdlib>
#include <cstring>

#include "../kernels.h"

namespace smpq::cpu {
namespace {

Isa detect() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("SMPQ_ISA");
  const auto allowed = [&](const char* level) { return !wanted || std::strcmp(wanted, level) == 0; };
  if (wanted && std::strcmp(wanted, "baseline") == 0) return Isa::baseline;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx512 && !(wanted && allowed("avx2"))) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

}  // namespace

Isa isa() {
  static const Isa found = detect();
  return found;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace smpq::cpu
