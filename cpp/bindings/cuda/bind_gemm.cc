// Linear layers on arrays of a device.
#include <pybind11/pybind11.h>

#include <optional>

#include "device_array.h"
#include "sagellm/kernels/cuda/gemm.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using namespace sagellm;  // NOLINT: a binding file of the core

const void* rows_of(const DeviceArray& array, const char* name) {
  require<InvalidArgument>(array.shape().size() == 2, name, " has ", array.shape().size(),
                           " axes, must have 2");
  return array.elements<uint16_t>(name, array.size());
}

/// out = x @ weights.T + bias, with the project's own kernel.
void gemm(const DeviceArray& x, const DeviceArray& weights, DeviceArray& out,
          const DeviceArray* bias, const std::string& type) {
  const auto input = float_type_of(type);
  kernels::cuda::GemmParams p;
  p.x = rows_of(x, "x");
  p.weights = rows_of(weights, "weights");
  p.m = static_cast<int32_t>(x.shape()[0]);
  p.k = static_cast<int32_t>(x.shape()[1]);
  p.n = static_cast<int32_t>(weights.shape()[0]);
  require<InvalidArgument>(weights.shape()[1] == p.k && p.k % 8 == 0, "weights have ",
                           weights.shape()[1], " columns and x has ", p.k,
                           "; they must be equal and a multiple of 8");
  p.x_stride = p.weights_stride = p.k;
  p.out_stride = p.n;
  const int64_t count = int64_t{p.m} * p.n;
  const bool wide = out.dtype().itemsize() == 4;
  p.out = wide ? static_cast<void*>(out.elements<float>("out", count))
               : out.elements<uint16_t>("out", count);
  if (bias != nullptr) p.bias = bias->elements<uint16_t>("bias", p.n);
  kernels::cuda::gemm(input, wide ? kernels::cuda::FloatType::kF32 : input, p, nullptr);
}

}  // namespace

void register_gemm(py::module_& m) {
  m.def("gemm", &gemm, "x"_a, "weights"_a, "out"_a, "bias"_a = py::none(), "type"_a = "bfloat16",
        py::call_guard<py::gil_scoped_release>(),
        "out = x @ weights.T + bias with the project's own kernel; x [m, k] and weights [n, k] are "
        "`type`, out [m, n] is the same or float32.");
}
