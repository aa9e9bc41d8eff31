// Linear layers on arrays of a device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <vector>

#include "device_array.h"
#include "fp8_matrix.h"
#include "sagellm/cuda/cublas_lt.h"
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

struct Product {
  kernels::cuda::FloatType input, output;
  kernels::cuda::GemmParams params;
};

/// The checked parameters of out = x @ weights.T + bias.
Product product_of(const DeviceArray& x, const DeviceArray& weights, const DeviceArray& out,
                   const DeviceArray* bias, const std::string& type) {
  Product product;
  product.input = float_type_of(type);
  kernels::cuda::GemmParams& p = product.params;
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
  product.output = wide ? kernels::cuda::FloatType::kF32 : product.input;
  p.out = wide ? static_cast<void*>(out.elements<float>("out", count))
               : out.elements<uint16_t>("out", count);
  if (bias != nullptr) p.bias = bias->elements<uint16_t>("bias", p.n);
  return product;
}

void gemm(const DeviceArray& x, const DeviceArray& weights, const DeviceArray& out,
          const DeviceArray* bias, const std::string& type) {
  const Product product = product_of(x, weights, out, bias, type);
  const py::gil_scoped_release release;
  kernels::cuda::gemm(product.input, product.output, product.params, nullptr);
}

/// cuBLASLt and the algorithms that it chose.
struct Library {
  explicit Library(const std::vector<std::string>& folders)
      : library(std::make_shared<cuda::CublasLt>(folders)), product(library) {}

  std::shared_ptr<const cuda::CublasLt> library;
  cuda::CublasLtGemm product;
};

void library_gemm(Library& library, const DeviceArray& x, const DeviceArray& weights,
                  const DeviceArray& out, const DeviceArray* bias, const std::string& type) {
  const Product product = product_of(x, weights, out, bias, type);
  const py::gil_scoped_release release;
  library.product(product.input, product.output, product.params, nullptr);
}

bool library_fp8_gemm(Library& library, const DeviceArray& x, const DeviceArray& x_scales,
                      const DeviceArray& codes, const DeviceArray& scales, const DeviceArray& out,
                      const std::string& type) {
  const Fp8Product product = fp8_product_of(x, x_scales, codes, scales, out, type);
  const py::gil_scoped_release release;
  return library.product.fp8(product.output, product.params, nullptr);
}

}  // namespace

void register_gemm(py::module_& m) {
  m.def("gemm", &gemm, "x"_a, "weights"_a, "out"_a, "bias"_a = py::none(), "type"_a = "bfloat16",
        "out = x @ weights.T + bias with the project's own kernel; x [m, k] and weights [n, k] are "
        "`type`, out [m, n] is the same or float32.");
  py::class_<Library>(m, "CublasLt", py::module_local(),
                      "cuBLASLt, opened from one of `folders` or the system.")
      .def(py::init<const std::vector<std::string>&>(), "folders"_a = std::vector<std::string>{})
      .def_property_readonly("version", [](const Library& l) { return l.library->version(); })
      .def_property_readonly("path", [](const Library& l) { return l.library->path(); })
      .def_property_readonly("plans", [](const Library& l) { return l.product.plans(); })
      .def("gemm", &library_gemm, "x"_a, "weights"_a, "out"_a, "bias"_a = py::none(),
           "type"_a = "bfloat16", "Like the function gemm, through the library.")
      .def("fp8_gemm", &library_fp8_gemm, "x"_a, "x_scales"_a, "codes"_a, "scales"_a, "out"_a,
           "type"_a = "bfloat16",
           "Like the function fp8_gemm, through the library; False where it cannot.");
}
