// Which of the compiled instruction sets this processor runs.
#include <cstdlib>
#include <cstring>

#include "../kernels.h"

namespace smpq::cpu {
namespace {

Isa detect() {
#if defined(__x86_64__)
  const char* most = std::getenv("SMPQ_ISA");
  const auto capped_at = [&](const char* level) { return most && std::strcmp(most, level) == 0; };
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx2 && !capped_at("baseline")) return avx512 && !capped_at("avx2") ? Isa::avx512 : Isa::avx2;
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
