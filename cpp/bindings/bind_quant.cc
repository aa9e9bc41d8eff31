// sagellm._core.quant: conversion of stored formats, and packed matrices.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "sagellm/base/dtype.h"
#include "sagellm/base/error.h"
#include "sagellm/quant/codec.h"
#include "sagellm/quant/pack.h"
#include "sagellm/quant/unpack.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using namespace sagellm::quant;
using sagellm::Format;
using sagellm::InvalidArgument;
using sagellm::require;
using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;
using Indices = py::array_t<int64_t, py::array::c_style>;

Floats dequantize(const std::string& format_name, const Bytes& raw, int64_t n) {
  const Format format = sagellm::format_from_name(format_name);
  const int64_t expected = sagellm::row_bytes(format, n);
  require<InvalidArgument>(raw.size() == expected, n, " elements of ", format_name, " take ",
                           expected, " bytes, got ", raw.size());
  Floats out(n);
  const uint8_t* src = raw.data();
  float* dst = out.mutable_data();
  {
    const py::gil_scoped_release release;
    dequantize_row(format, src, dst, n);
  }
  return out;
}

Bytes quantize(const std::string& format_name, const Floats& values) {
  const Format format = sagellm::format_from_name(format_name);
  require<InvalidArgument>(values.ndim() >= 1, "values must have at least one dimension");
  std::vector<py::ssize_t> shape(values.shape(), values.shape() + values.ndim());
  shape.back() = static_cast<py::ssize_t>(sagellm::row_bytes(format, shape.back()));
  Bytes out(shape);
  const float* src = values.data();
  uint8_t* dst = out.mutable_data();
  const auto n = static_cast<int64_t>(values.size());
  {
    const py::gil_scoped_release release;
    quantize_row(format, src, dst, n);
  }
  return out;
}

std::shared_ptr<PackedMatrix> pack(const std::string& format_name, const Bytes& raw, int64_t n,
                                   int64_t k, const std::optional<Indices>& row_map,
                                   const std::optional<Floats>& scales) {
  const Format format = sagellm::format_from_name(format_name);
  auto out = std::make_shared<PackedMatrix>(make_packed(format, n, k));
  const int64_t row = sagellm::row_bytes(format, k);
  const auto size = static_cast<int64_t>(raw.size());
  require<InvalidArgument>(size % row == 0, size, " bytes are not whole rows of ", row);
  std::span<const int64_t> map;
  if (row_map.has_value()) {
    map = {row_map->data(), static_cast<size_t>(row_map->size())};
    require<InvalidArgument>(map.size() == static_cast<size_t>(n), "row_map has ", map.size(),
                             " entries, expected ", n);
    for (const int64_t from : map) {
      require<InvalidArgument>(from >= 0 && from < size / row, "row_map names row ", from, " of ",
                               size / row);
    }
  } else {
    require<InvalidArgument>(size / row == n, "raw holds ", size / row, " rows, expected ", n);
  }
  std::optional<ScaleGrid> grid;
  if (scales.has_value()) {
    require<InvalidArgument>(format == Format::kF8_E4M3, "only F8_E4M3 rows have scales");
    const std::vector<int64_t> shape(scales->shape(), scales->shape() + scales->ndim());
    const auto* data = reinterpret_cast<const uint8_t*>(scales->data());
    grid.emplace("scales", Format::kF32, shape, data, n, k);
  }
  const uint8_t* src = raw.data();
  {
    const py::gil_scoped_release release;
    pack_row_blocks(format, src, static_cast<size_t>(row), map, *out, 0, out->num_row_blocks(),
                    grid ? &*grid : nullptr);
  }
  return out;
}

Floats unpack(const PackedMatrix& matrix, int64_t row) {
  Floats out(matrix.k);
  unpack_row(matrix, row, out.mutable_data());
  return out;
}

py::array packed_bytes(const py::object& self) {
  const auto& matrix = self.cast<const PackedMatrix&>();
  Bytes view(static_cast<py::ssize_t>(matrix.bytes()), matrix.storage.data(), self);
  view.attr("flags").attr("writeable") = false;
  return view;
}

}  // namespace

void register_quant(py::module_& m) {
  py::module_ sub =
      m.def_submodule("quant", "Storage formats of weights and the packed layout of the kernels.");

  py::list formats;
  for (int i = 0; i < sagellm::kNumFormats; ++i) {
    formats.append(std::string(sagellm::format_info(static_cast<Format>(i)).name));
  }
  sub.attr("FORMATS") = py::tuple(formats);

  sub.def("dequantize", &dequantize, "format"_a, "raw"_a.noconvert(), "n"_a,
          "Float32 values of n stored elements; raw is uint8 of exactly their bytes.");
  sub.def("quantize", &quantize, "format"_a, "values"_a.noconvert(),
          "Bytes (uint8) of float32 values; the last axis becomes bytes. F32, F16, BF16, Q4_0, "
          "Q4_1, Q5_0, Q5_1, Q8_0.");

  py::class_<PackedMatrix, std::shared_ptr<PackedMatrix>>(
      sub, "PackedMatrix", "A weight matrix in the layout of the kernels.")
      .def_property_readonly(
          "format", [](const PackedMatrix& p) { return std::string(packed_format_name(p.format)); })
      .def_readonly("n", &PackedMatrix::n, "Rows (outputs).")
      .def_readonly("k", &PackedMatrix::k, "Columns (inputs).")
      .def_readonly("row_block_stride", &PackedMatrix::row_block_stride, "Bytes of 16 rows.")
      .def_property_readonly("nbytes", &PackedMatrix::bytes)
      .def_property_readonly("data", &packed_bytes, "The packed bytes: a read-only uint8 view.")
      .def("unpack_row", &unpack, "row"_a, "Float32 values of a row, bitwise those of the source.");

  sub.def("pack", &pack, "format"_a, "raw"_a.noconvert(), "n"_a, "k"_a,
          py::arg("row_map").noconvert() = py::none(), py::arg("scales").noconvert() = py::none(),
          "Packs rows of `format` ([rows, row bytes], uint8); packed row i is source row "
          "row_map[i] (int64), or i. `scales` of F8_E4M3: float32, one, one per source row, or one "
          "per 128 x 128 block; 1 where there are none.");
}
