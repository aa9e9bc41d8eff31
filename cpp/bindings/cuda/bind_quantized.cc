// Weights in GGUF formats, and products of few rows, on arrays of a device.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <vector>

#include "device_array.h"
#include "sagellm/cuda/stream.h"
#include "sagellm/kernels/cuda/quantized.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using namespace sagellm;                 // NOLINT: a binding file of the core
using namespace sagellm::kernels::cuda;  // NOLINT
using Bytes = py::array_t<uint8_t, py::array::c_style>;

/// A matrix in the kernels' layout, and its memory.
struct Matrix {
  QuantMatrix view;
  cuda::DeviceBuffer memory;
};

std::unique_ptr<Matrix> make_matrix(const std::string& format_name, const Bytes& raw, int64_t n,
                                    int64_t k) {
  auto matrix = std::make_unique<Matrix>();
  QuantMatrix& view = matrix->view;
  view.format = format_from_name(format_name);
  view.layout = quant_layout(view.format, n, k);
  view.n = static_cast<int32_t>(n);
  view.k = static_cast<int32_t>(k);
  const int64_t stride = row_bytes(view.format, k);
  require<InvalidArgument>(raw.size() == n * stride, n, " rows of ", format_name, " take ",
                           n * stride, " bytes, got ", raw.size());
  std::vector<uint8_t> host(static_cast<size_t>(view.layout.bytes()));
  for (int32_t tile = 0; tile < view.layout.tile_rows; ++tile) {
    const int64_t first = int64_t{tile} * kTileRows;
    repack_tile_row(view.format, k, raw.data() + first * stride, stride,
                    static_cast<int32_t>(std::min<int64_t>(kTileRows, n - first)),
                    host.data() + tile * view.layout.tile_row_bytes);
  }
  matrix->memory = cuda::DeviceBuffer(host.size());
  cuda::copy_to_device(matrix->memory.data(), host.data(), host.size(), nullptr);
  cuda::synchronize(nullptr);
  view.data = matrix->memory.as<uint8_t>();
  return matrix;
}

/// The array's elements, in 4 or 2 bytes as `type` has them.
void* elements_of(const DeviceArray& array, FloatType type, const char* name, int64_t count) {
  if (type == FloatType::kF32) return array.elements<float>(name, count);
  return array.elements<uint16_t>(name, count);
}

int32_t rows_of(const DeviceArray& x, int64_t k) {
  require<InvalidArgument>(x.shape().size() == 2 && x.shape()[1] == k, "x must have 2 axes and ", k,
                           " columns");
  require<InvalidArgument>(x.shape()[0] <= kQuantColumns, "x has ", x.shape()[0],
                           " rows; these kernels take ", kQuantColumns);
  return static_cast<int32_t>(x.shape()[0]);
}

DeviceArray quantize(const DeviceArray& x, const std::string& type) {
  const FloatType element = float_type_of(type);
  require<InvalidArgument>(x.shape().size() == 2, "x must have 2 axes");
  const int64_t k = x.shape()[1];
  DeviceArray codes({quantized_rows_bytes(k)}, py::dtype::of<uint8_t>());
  QuantizeRowsParams p;
  p.m = rows_of(x, k);
  p.k = static_cast<int32_t>(k);
  p.x = elements_of(x, element, "x", x.size());
  p.x_stride = k;
  p.data = codes.elements<uint8_t>("codes", quantized_rows_bytes(k));
  quantize_rows(element, p, nullptr);
  return codes;
}

void linear(const Matrix& weights, const DeviceArray& x, const DeviceArray& out,
            const DeviceArray* bias, const std::string& type, const std::string& out_type) {
  QuantizedLinearParams p;
  p.m = rows_of(x, weights.view.k);
  const DeviceArray codes = quantize(x, type);
  p.weights = weights.view;
  p.x = codes.elements<uint8_t>("codes", codes.size());
  p.out_type = float_type_of(out_type);
  p.out = elements_of(out, p.out_type, "out", int64_t{p.m} * weights.view.n);
  p.out_stride = weights.view.n;
  if (bias != nullptr) p.bias = bias->elements<float>("bias", weights.view.n);
  quantized_linear(p, nullptr);
  cuda::synchronize(nullptr);  // before `codes` goes
}

void values(const Matrix& weights, const DeviceArray& out, int first_row, int num_rows,
            int first_column, int num_columns, const std::string& type) {
  DequantizeParams p;
  p.weights = weights.view;
  p.out_type = float_type_of(type);
  require<InvalidArgument>(p.out_type != FloatType::kF32, "type must be bfloat16 or float16");
  require<InvalidArgument>(first_row >= 0 && num_rows >= 0 && first_row % kTileRows == 0 &&
                               first_row + num_rows <= p.weights.n,
                           "rows ", first_row, " + ", num_rows, " must lie in the matrix of ",
                           p.weights.n, " and begin at a multiple of 16");
  require<InvalidArgument>(
      first_column >= 0 && num_columns >= 0 && first_column % kUnitColumns == 0 &&
          num_columns % kUnitColumns == 0 && first_column + num_columns <= p.weights.k,
      "columns ", first_column, " + ", num_columns, " must lie in the matrix of ", p.weights.k,
      " in multiples of 32");
  p.out = out.elements<uint16_t>("out", int64_t{num_rows} * num_columns);
  p.out_stride = num_columns;
  p.first_row = first_row;
  p.num_rows = num_rows;
  p.first_column = first_column;
  p.num_columns = num_columns;
  const py::gil_scoped_release release;
  dequantize(p, nullptr);
}

void embed(const Matrix& weights, const DeviceArray& token_ids, const DeviceArray& out,
           float scale) {
  QuantizedEmbeddingParams p;
  p.weights = weights.view;
  p.num_tokens = static_cast<int32_t>(token_ids.size());
  p.token_ids = token_ids.elements<int32_t>("token_ids", p.num_tokens);
  p.out = out.elements<float>("out", int64_t{p.num_tokens} * p.weights.k);
  p.out_stride = p.weights.k;
  p.scale = scale;
  const py::gil_scoped_release release;
  quantized_embedding(p, nullptr);
}

void dense(const DeviceArray& x, const DeviceArray& weights, const DeviceArray& out,
           const DeviceArray* bias, const std::string& type) {
  SmallLinearParams p;
  require<InvalidArgument>(weights.shape().size() == 2 && weights.shape()[1] % 8 == 0,
                           "weights must have 2 axes and columns in multiples of 8");
  p.k = static_cast<int32_t>(weights.shape()[1]);
  p.n = static_cast<int32_t>(weights.shape()[0]);
  p.m = rows_of(x, p.k);
  p.type = float_type_of(type);
  require<InvalidArgument>(p.type != FloatType::kF32, "type must be bfloat16 or float16");
  p.x = x.elements<uint16_t>("x", x.size());
  p.weights = weights.elements<uint16_t>("weights", weights.size());
  p.x_stride = p.weights_stride = p.k;
  p.out_type = out.dtype().itemsize() == 4 ? FloatType::kF32 : p.type;
  p.out = elements_of(out, p.out_type, "out", int64_t{p.m} * p.n);
  p.out_stride = p.n;
  if (bias != nullptr) p.bias = bias->elements<float>("bias", p.n);
  const py::gil_scoped_release release;
  small_linear(p, nullptr);
}

}  // namespace

void register_quantized(py::module_& m) {
  py::class_<Matrix>(m, "QuantizedMatrix", py::module_local(),
                     "A weight matrix [n, k] in a GGUF format, in the layout of the kernels.")
      .def(py::init(&make_matrix), "format"_a, "raw"_a, "n"_a, "k"_a,
           "`raw` is n rows as in a file.")
      .def_property_readonly("nbytes", [](const Matrix& a) { return a.view.layout.bytes(); })
      .def("linear", &linear, "x"_a, "out"_a, "bias"_a = py::none(), "type"_a = "bfloat16",
           "out_type"_a = "float32",
           "out = x @ weights.T + bias for up to 8 rows, x rounded to int8 per 32 columns.")
      .def("dequantize", &values, "out"_a, py::kw_only(), "first_row"_a, "num_rows"_a,
           "first_column"_a, "num_columns"_a, "type"_a = "bfloat16",
           "The values of a part of the matrix in 16 bits.")
      .def("embedding", &embed, "token_ids"_a, "out"_a, "scale"_a = 1.0f,
           "out[t] = weights[token_ids[t]] * scale, float32.");
  m.def("small_linear", &dense, "x"_a, "weights"_a, "out"_a, "bias"_a = py::none(),
        "type"_a = "bfloat16",
        "out = x @ weights.T + bias for up to 8 rows of 16-bit elements; bias is float32.");
}
