// Linear layers with FP8 weights on arrays of a device.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "fp8_matrix.h"
#include "sagellm/kernels/cuda/fp8.h"
#include "sagellm/kernels/cuda/quantized.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using namespace sagellm;                 // NOLINT: a binding file of the core
using namespace sagellm::kernels::cuda;  // NOLINT

void* elements_of(const DeviceArray& array, FloatType type, const char* name, int64_t count) {
  if (type == FloatType::kF32) return array.elements<float>(name, count);
  return array.elements<uint16_t>(name, count);
}

void small(const DeviceArray& x, const DeviceArray& codes, const DeviceArray& scales,
           const DeviceArray& out, const DeviceArray* bias, const std::string& type) {
  Fp8SmallLinearParams p;
  p.weights = fp8_matrix_of(codes, scales);
  p.type = float_type_of(type);
  require<InvalidArgument>(
      x.shape().size() == 2 && x.shape()[1] == p.weights.k && x.shape()[0] <= kQuantColumns,
      "x must have 2 axes, at most 8 rows and ", p.weights.k, " columns");
  p.m = static_cast<int32_t>(x.shape()[0]);
  p.x = x.elements<uint16_t>("x", x.size());
  p.x_stride = p.weights.k;
  if (bias != nullptr) p.bias = bias->elements<float>("bias", p.weights.n);
  p.out_type = out.dtype().itemsize() == 4 ? FloatType::kF32 : p.type;
  p.out = elements_of(out, p.out_type, "out", int64_t{p.m} * p.weights.n);
  p.out_stride = p.weights.n;
  const py::gil_scoped_release release;
  fp8_small_linear(p, nullptr);
}

void quantize(const DeviceArray& x, const DeviceArray& codes, const DeviceArray& scales,
              const std::string& type) {
  const FloatType from = float_type_of(type);
  require<InvalidArgument>(x.shape().size() == 2 && x.shape()[1] % kFp8Alignment == 0,
                           "x must have 2 axes and a multiple of ", kFp8Alignment, " columns");
  Fp8QuantizeParams p;
  p.m = static_cast<int32_t>(x.shape()[0]);
  p.k = static_cast<int32_t>(x.shape()[1]);
  p.x = elements_of(x, from, "x", x.size());
  p.x_stride = p.k;
  p.codes = codes.elements<uint8_t>("codes", x.size());
  p.scales = scales.elements<float>("scales", p.m);
  const py::gil_scoped_release release;
  fp8_quantize(from, p, nullptr);
}

void values(const DeviceArray& codes, const DeviceArray& scales, const DeviceArray& out,
            int32_t first_row, const std::string& type) {
  Fp8DequantizeParams p;
  p.weights = fp8_matrix_of(codes, scales);
  p.out_type = float_type_of(type);
  require<InvalidArgument>(p.out_type != FloatType::kF32, "type must be bfloat16 or float16");
  require<InvalidArgument>(out.shape().size() == 2 && out.shape()[1] == p.weights.k &&
                               first_row >= 0 && first_row + out.shape()[0] <= p.weights.n,
                           "out must have 2 axes, ", p.weights.k,
                           " columns, and rows that the matrix has from first_row on");
  p.out = out.elements<uint16_t>("out", out.size());
  p.first_row = first_row;
  p.num_rows = static_cast<int32_t>(out.shape()[0]);
  const py::gil_scoped_release release;
  fp8_dequantize(p, nullptr);
}

void product(const DeviceArray& x, const DeviceArray& x_scales, const DeviceArray& codes,
             const DeviceArray& scales, const DeviceArray& out, const std::string& type) {
  const Fp8Product product = fp8_product_of(x, x_scales, codes, scales, out, type);
  const py::gil_scoped_release release;
  fp8_gemm(product.output, product.params, nullptr);
}

}  // namespace

void register_fp8(py::module_& m) {
  m.def("fp8_small_linear", &small, "x"_a, "codes"_a, "scales"_a, "out"_a, "bias"_a = py::none(),
        "type"_a = "bfloat16",
        "out = x @ weights.T + bias for at most 8 rows of x [m, k] in `type`; codes [n, k] uint8, "
        "scales [1 or ceil(k / 128), n] float32; out [m, n] is `type` or float32.");
  m.def("fp8_quantize", &quantize, "x"_a, "codes"_a, "scales"_a, "type"_a = "bfloat16",
        "Rows of x as FP8 codes [m, k] and one scale [m] each.");
  m.def("fp8_gemm", &product, "x"_a, "x_scales"_a, "codes"_a, "scales"_a, "out"_a,
        "type"_a = "bfloat16", "out = x @ weights.T on FP8 tensor cores.");
  m.def("fp8_dequantize", &values, "codes"_a, "scales"_a, "out"_a, "first_row"_a = 0,
        "type"_a = "bfloat16", "The values of rows from first_row on.");
}
