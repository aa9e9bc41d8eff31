// Arrays in device memory for Python: what kernel functions of the bindings take and give.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/cuda/memory.h"
#include "sagellm/kernels/cuda/float_type.h"

/// A dense array on the current device. Elements are NumPy types; bfloat16 travels as uint16.
class DeviceArray {
 public:
  DeviceArray(std::vector<pybind11::ssize_t> shape, pybind11::dtype dtype)
      : shape_(std::move(shape)),
        dtype_(std::move(dtype)),
        buffer_(static_cast<size_t>(size() * dtype_.itemsize())) {}

  const std::vector<pybind11::ssize_t>& shape() const { return shape_; }
  const pybind11::dtype& dtype() const { return dtype_; }
  size_t bytes() const { return buffer_.size(); }
  pybind11::ssize_t size() const {
    pybind11::ssize_t count = 1;
    for (const auto extent : shape_) count *= extent;
    return count;
  }
  std::byte* data() const { return buffer_.data(); }

  /// The elements, once they are known to be `count` or more of itemsize sizeof(T).
  template <typename T>
  T* elements(const char* name, int64_t count) const {
    sagellm::require<sagellm::InvalidArgument>(
        dtype_.itemsize() == static_cast<pybind11::ssize_t>(sizeof(T)) && size() >= count, name,
        " has ", size(), " elements of ", dtype_.itemsize(), " bytes; ", count, " of ", sizeof(T),
        " bytes are needed");
    return reinterpret_cast<T*>(buffer_.data());
  }

 private:
  std::vector<pybind11::ssize_t> shape_;
  pybind11::dtype dtype_;
  sagellm::cuda::DeviceBuffer buffer_;
};

/// "bfloat16", "float16", "float32".
inline sagellm::kernels::cuda::FloatType float_type_of(const std::string& name) {
  using sagellm::kernels::cuda::FloatType;
  if (name == "bfloat16") return FloatType::kBF16;
  if (name == "float16") return FloatType::kF16;
  if (name == "float32") return FloatType::kF32;
  sagellm::fail<sagellm::InvalidArgument>("type is '", name,
                                          "', must be bfloat16, float16 or float32");
}
