// Memory of a kernel's own. Everything has internal linkage.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace smpq::cpu::SMPQ_ISA {
namespace {

// Not a container, whose code, compiled for one instruction set, could end up in all of them.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : memory_(static_cast<T*>(std::malloc(std::max<int64_t>(count, 1) * sizeof(T)))) {
    if (!memory_) throw std::bad_alloc();
  }
  ~Buffer() { std::free(memory_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return memory_; }

 private:
  T* memory_;
};

}  // namespace
}  // namespace smpq::cpu::SMPQ_ISA
