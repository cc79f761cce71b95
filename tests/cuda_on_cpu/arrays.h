// numpy arrays as kernels see them. 16-bit floats come as uint16: numpy has no bfloat16.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <vector>

#include "common/platform.h"
#include "cuda_on_cpu.h"

namespace sr_kernels {

namespace py = pybind11;

// An array, or None. Kernels may touch what lies between its first and its last element for as long
// as this lives.
class Array {
 public:
  explicit Array(const py::object& object)
      : array_(object.is_none() ? std::nullopt : std::optional(py::cast<py::array>(object))),
        memory_(data(), span()) {}

  void* data() const { return array_ ? const_cast<void*>(array_->data()) : nullptr; }
  void zero() const {
    if (data() != nullptr) std::memset(data(), 0, span());
  }
  int64_t size(int d) const { return array_->shape(d); }
  FeatureMap map() const {
    if (!array_) return {};
    if (array_->ndim() != 4) throw std::invalid_argument("a feature map has 4 dimensions");
    const auto stride = [this](int d) { return array_->strides(d) / array_->itemsize(); };
    return {data(), stride(0), stride(1), stride(2), stride(3)};
  }

 private:
  size_t span() const {
    if (!array_ || array_->size() == 0) return 0;
    int64_t bytes = array_->itemsize();
    for (int d = 0; d < array_->ndim(); ++d) bytes += (array_->shape(d) - 1) * array_->strides(d);
    return static_cast<size_t>(bytes);
  }

  std::optional<py::array> array_;
  cuda_on_cpu::Memory memory_;
};

// What a launch function says that it needs, filled with NaN; nullptr where that is nothing, as
// CudaWorkspace's.
class Workspace {
 public:
  explicit Workspace(int64_t bytes)
      : bytes_(bytes > 0 ? static_cast<size_t>(bytes) + 255 : 0, static_cast<char>(0xff)),
        memory_(data(), static_cast<size_t>(bytes)) {}
  void* data() {
    if (bytes_.empty()) return nullptr;
    const auto address = reinterpret_cast<uintptr_t>(bytes_.data());
    return reinterpret_cast<void*>((address + 255) / 256 * 256);
  }

 private:
  std::vector<char> bytes_;
  cuda_on_cpu::Memory memory_;
};

inline void require_success(const char* error) {
  if (error != nullptr) throw std::runtime_error(error);
}

}  // namespace sr_kernels
