// How a torch tensor is seen by the kernels: dense memory as [outer, channels, inner], its types, and where it runs.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

// The test build registers the CUDA kernels, compiled for an emulator, as CPU ops under a name of their own.
#ifdef SMPQ_EMULATE
#define SMPQ_LIBRARY smpq_emulated
#else
#define SMPQ_LIBRARY smpq
#endif

// Only in CUDA builds of torch; weak, so that one binary loads beside either build.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

// Throws std::runtime_error with the message alone: what the user did, not where we noticed.
#define SMPQ_CHECK(condition, ...)               \
  do {                                           \
    if (!(condition)) ::smpq::fail(__VA_ARGS__); \
  } while (0)

namespace smpq {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A call of torch's C functions; what torch's own macro for it is called differs between its versions.
inline void succeeds(AOTITorchError code, const char* what) {
  SMPQ_CHECK(code == AOTI_TORCH_SUCCESS, "smpq_ext: torch fails to give ", what);
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::string s = "[";
  for (int64_t d = 0; d < t.dim(); ++d) s.append(d ? ", " : "").append(std::to_string(t.size(d)));
  return s.append("]");
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && (!a.is_cuda() || a.get_device_index() == b.get_device_index());
}

// Dimensions from the slowest to the fastest in memory, or nothing where elements overlap or leave gaps.
inline std::optional<std::vector<int64_t>> memory_order(const Tensor& t) {
  std::vector<int64_t> order(t.dim());
  std::iota(order.begin(), order.end(), 0);
  // A dimension of size 1 may have any stride; it moves no element.
  order.erase(std::remove_if(order.begin(), order.end(), [&](int64_t d) { return t.size(d) == 1; }), order.end());
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return t.stride(a) > t.stride(b); });
  int64_t expected = 1;
  for (auto d = order.rbegin(); d != order.rend(); ++d) {
    if (t.stride(*d) != expected) return std::nullopt;
    expected *= t.size(*d);
  }
  return order;
}

// A copy of `source` with the strides of `like`.
inline Tensor copy_as(const Tensor& source, const Tensor& like) {
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, source);
  return copy;
}

// x itself where it is dense, else a copy with the strides that empty_like(x) has.
inline Tensor dense(const Tensor& x) { return x.numel() == 0 || memory_order(x) ? x : copy_as(x, x); }

inline int64_t wrap_axis(int64_t axis, int64_t dims, const char* op) {
  SMPQ_CHECK(axis >= -dims && axis < dims, op, ": axis ", axis, " is not a dimension of x, which has ", dims);
  return axis < 0 ? axis + dims : axis;
}

// The shape of a dense x whose dimension `axis` (wrapped; none: the whole tensor) owns the scales.
inline Shape3 shape3(const Tensor& x, std::optional<int64_t> axis) {
  if (!axis || x.numel() == 0) return {1, 1, x.numel()};
  Shape3 shape{1, x.size(*axis), 1};
  bool before = true;
  const auto order = memory_order(x);
  const bool moves = x.size(*axis) != 1;
  if (!moves) return {1, 1, x.numel()};
  for (int64_t d : *order) {
    if (d == *axis) {
      before = false;
    } else {
      (before ? shape.outer : shape.inner) *= x.size(d);
    }
  }
  return shape;
}

template <class T_, class C_, class Z_>
struct Types {
  using T = T_;
  using C = C_;
  using Z = Z_;
};

// Calls f(Types<T, C, Z>{}) for the element type of x and the type of the zero point (absent: integer).
template <class F>
void dispatch(const char* op, const Tensor& x, const Tensor& scale, const std::optional<Tensor>& zero_point, F&& f) {
  const bool is_double = x.scalar_type() == ScalarType::Double;
  const ScalarType compute = is_double ? ScalarType::Double : ScalarType::Float;
  SMPQ_CHECK(scale.scalar_type() == compute, op, ": scale must be ", is_double ? "float64" : "float32", " for this x");
  const bool integer = !zero_point || zero_point->scalar_type() == ScalarType::Int;
  SMPQ_CHECK(integer || zero_point->scalar_type() == compute, op,
             ": zero_point must be int32 or have the dtype of scale");
  const auto with = [&](auto t, auto c) {
    using T = decltype(t);
    using C = decltype(c);
    integer ? f(Types<T, C, int32_t>{}) : f(Types<T, C, C>{});
  };
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return with(float{}, float{});
    case ScalarType::BFloat16:
      return with(BFloat16{}, float{});
    case ScalarType::Half:
      return with(Float16{}, float{});
    case ScalarType::Double:
      return with(double{}, double{});
    default:
      SMPQ_CHECK(false, op, ": x must be float32, bfloat16, float16 or float64");
  }
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
const T* data(const std::optional<Tensor>& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline Tensor new_float64(const Tensor& like, std::vector<int64_t> size) {
  return torch::stable::new_empty(like, size, ScalarType::Double);
}

// Whether the CUDA kernels run.
inline bool on_device([[maybe_unused]] const Tensor& x) {
#ifdef SMPQ_EMULATE
  return true;
#else
  return x.is_cuda();
#endif
}

// Runs `on_device(stream)` for CUDA tensors, else `on_cpu(first, last)` over ranges of `units`, shared out over
// threads.
template <class OnDevice, class OnCpu>
void launch([[maybe_unused]] const Tensor& x, [[maybe_unused]] OnDevice&& on_device, [[maybe_unused]] OnCpu&& on_cpu,
            [[maybe_unused]] int64_t units, [[maybe_unused]] int64_t grain) {
#ifdef SMPQ_EMULATE
  on_device(static_cast<void*>(nullptr));
#else
  if (x.is_cuda()) {
#ifdef SMPQ_CUDA
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    void* stream = nullptr;
    SMPQ_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "smpq_ext: this build of torch has no CUDA");
    succeeds(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream), "the current stream");
    on_device(stream);
#endif
  } else if (units > 0) {
    torch::stable::parallel_for(0, units, grain, on_cpu);
  }
#endif
}

using OptionalTensor = std::optional<Tensor>;

// Sizes of -1 are any; on the device of `like`.
inline void check_tensor(const char* op, const Tensor& like, const Tensor& t, const char* name, ScalarType type,
                         const std::vector<int64_t>& size) {
  bool fits = t.scalar_type() == type && t.is_contiguous() && t.dim() == static_cast<int64_t>(size.size());
  for (int64_t d = 0; fits && d < t.dim(); ++d) fits = size[d] < 0 || t.size(d) == size[d];
  std::string wanted = "[";
  for (size_t d = 0; d < size.size(); ++d) {
    wanted.append(d ? ", " : "").append(size[d] < 0 ? "*" : std::to_string(size[d]));
  }
  SMPQ_CHECK(same_device(t, like), op, ": ", name, " must be on the device of x");
  SMPQ_CHECK(fits, op, ": ", name, " ", shape_of(t), " must be contiguous, of its dtype, and ", wanted, "]");
}

// On the CPU alone: on CUDA looking would mean waiting, and whoever calls must know that they are in range.
inline void check_indices(const char* op, const Tensor& t, const char* name, int64_t bound) {
  if (on_device(t)) return;
  const int64_t* index = data<int64_t>(t);
  for (int64_t k = 0; k < t.numel(); ++k) {
    SMPQ_CHECK(index[k] >= 0 && index[k] < bound, op, ": ", name, "[", k, "] is ", index[k], ", there are ", bound);
  }
}

}  // namespace smpq

// Calls the kernel that was compiled for this processor.
#if defined(__x86_64__)
#define SMPQ_ON_CPU(kernel, ...)                  \
  switch (::smpq::cpu::isa()) {                   \
    case ::smpq::cpu::Isa::avx512:                \
      ::smpq::cpu::avx512::kernel(__VA_ARGS__);   \
      break;                                      \
    case ::smpq::cpu::Isa::avx2:                  \
      ::smpq::cpu::avx2::kernel(__VA_ARGS__);     \
      break;                                      \
    default:                                      \
      ::smpq::cpu::baseline::kernel(__VA_ARGS__); \
  }
#else
#define SMPQ_ON_CPU(kernel, ...) ::smpq::cpu::baseline::kernel(__VA_ARGS__)
#endif

// Registers `function` for the devices that this build serves.
#if defined(SMPQ_EMULATE) || !defined(SMPQ_CUDA)
#define SMPQ_REGISTER(name, function) \
  STABLE_TORCH_LIBRARY_IMPL(SMPQ_LIBRARY, CPU, m) { m.impl(name, TORCH_BOX(&function)); }
#else
#define SMPQ_REGISTER(name, function)                                                     \
  STABLE_TORCH_LIBRARY_IMPL(SMPQ_LIBRARY, CPU, m) { m.impl(name, TORCH_BOX(&function)); } \
  STABLE_TORCH_LIBRARY_IMPL(SMPQ_LIBRARY, CUDA, m) { m.impl(name, TORCH_BOX(&function)); }
#endif
