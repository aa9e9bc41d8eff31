// sagellm._core.checkpoint: GGUF and safetensors files.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "sagellm/base/dtype.h"
#include "sagellm/base/error.h"
#include "sagellm/checkpoint/file.h"
#include "sagellm/checkpoint/gguf.h"
#include "sagellm/checkpoint/safetensors.h"
#include "sagellm/quant/codec.h"
#include "string_array.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using namespace sagellm::checkpoint;

py::array read_only(py::array array) {
  array.attr("flags").attr("writeable") = false;
  return array;
}

const char* numpy_dtype(GgufType type) {
  switch (type) {
    case GgufType::kUint8:
      return "u1";
    case GgufType::kInt8:
      return "i1";
    case GgufType::kUint16:
      return "u2";
    case GgufType::kInt16:
      return "i2";
    case GgufType::kUint32:
      return "u4";
    case GgufType::kInt32:
      return "i4";
    case GgufType::kFloat32:
      return "f4";
    case GgufType::kBool:
      return "?";
    case GgufType::kUint64:
      return "u8";
    case GgufType::kInt64:
      return "i8";
    case GgufType::kFloat64:
      return "f8";
    case GgufType::kString:
    case GgufType::kArray:
      break;
  }
  sagellm::fail<sagellm::CorruptFile>("an array of type ", static_cast<uint32_t>(type),
                                      " holds no numbers");
}

py::object to_python(const GgufValue& value);

struct ToPython {
  py::object operator()(bool v) const { return py::bool_(v); }
  py::object operator()(int64_t v) const { return py::int_(v); }
  py::object operator()(uint64_t v) const { return py::int_(v); }
  py::object operator()(double v) const { return py::float_(v); }
  py::object operator()(std::string_view v) const { return py::str(v.data(), v.size()); }
  py::object operator()(const GgufNumbers& v) const {
    py::array array(py::dtype(numpy_dtype(v.type)),
                    std::vector<py::ssize_t>{static_cast<py::ssize_t>(v.count)});
    if (v.count > 0) std::memcpy(array.mutable_data(), v.data, static_cast<size_t>(array.nbytes()));
    return read_only(std::move(array));
  }
  py::object operator()(const std::vector<std::string_view>& v) const {
    py::list list(v.size());
    for (size_t i = 0; i < v.size(); ++i) list[i] = py::str(v[i].data(), v[i].size());
    return list;
  }
  py::object operator()(const std::vector<GgufValue>& v) const {
    py::list list(v.size());
    for (size_t i = 0; i < v.size(); ++i) list[i] = to_python(v[i]);
    return list;
  }
};

py::object to_python(const GgufValue& value) { return std::visit(ToPython{}, value.value); }

/// Returns the attribute `name` of `self`, made by `make` on first use: large vocabularies are
/// converted once.
template <typename Make>
py::object cached(const py::object& self, const char* name, Make make) {
  if (!py::hasattr(self, name)) self.attr(name) = make();
  return self.attr(name);
}

py::object gguf_metadata(const py::object& self) {
  return cached(self, "_metadata", [&] {
    py::dict out;
    const auto file = self.cast<std::shared_ptr<GgufFile>>();
    for (const auto& [key, value] : file->metadata()) {
      const auto* texts = std::get_if<std::vector<std::string_view>>(&value.value);
      out[py::str(key)] = texts == nullptr ? to_python(value) : py::cast(StringArray{file, texts});
    }
    return out;
  });
}

py::str text_at(const StringArray& array, py::ssize_t index) {
  const auto size = static_cast<py::ssize_t>(array.texts->size());
  if (index < 0) index += size;
  if (index < 0 || index >= size) throw py::index_error("the array has no such string");
  const std::string_view text = (*array.texts)[static_cast<size_t>(index)];
  return {text.data(), text.size()};
}

py::object tensors(const py::object& self) {
  return cached(self, "_tensors", [&] {
    py::dict out;
    for (const auto& [name, info] : self.cast<const File&>().tensors())
      out[py::str(name)] = py::cast(info);
    return out;
  });
}

std::string format_name(const TensorInfo& info) {
  return info.unreadable.empty() ? std::string(sagellm::format_info(info.format).name)
                                 : info.unreadable;
}

py::tuple shape_of(const TensorInfo& info) { return py::tuple(py::cast(info.shape)); }

/// A view of the mapping; the array holds `self`, so the file outlives it.
py::array raw(const py::object& self, const std::string& name) {
  const TensorInfo& info = self.cast<const File&>().tensor(name);
  return read_only(py::array_t<uint8_t>(static_cast<py::ssize_t>(info.nbytes), info.data, self));
}

py::array_t<float> dequantize(const File& file, const std::string& name) {
  const TensorInfo& info = file.tensor(name);
  py::array_t<float> out(std::vector<py::ssize_t>(info.shape.begin(), info.shape.end()));
  float* data = out.mutable_data();
  const auto elements = static_cast<int64_t>(out.size());
  {
    const py::gil_scoped_release release;
    sagellm::quant::dequantize_row(info.format, info.data, data, elements);
  }
  return out;
}

}  // namespace

void register_checkpoint(py::module_& m) {
  py::module_ sub = m.def_submodule(
      "checkpoint", "Checkpoint files, memory-mapped and fully checked on opening.");

  py::class_<TensorInfo>(sub, "TensorInfo", "A tensor inside a checkpoint file.")
      .def_readonly("name", &TensorInfo::name)
      .def_property_readonly("format", &format_name,
                             "Storage format, \"Q4_1\"; a name that is not in "
                             "_core.quant.FORMATS cannot be read.")
      .def_property_readonly("shape", &shape_of, "Extents, outermost first.")
      .def_readonly("nbytes", &TensorInfo::nbytes)
      .def("__repr__", [](const TensorInfo& info) {
        return py::str("TensorInfo(name={!r}, format={!r}, shape={}, nbytes={})")
            .format(info.name, format_name(info), shape_of(info), info.nbytes);
      });

  py::class_<File, std::shared_ptr<File>>(sub, "File", py::dynamic_attr(),
                                          "An open checkpoint file.")
      .def_property_readonly("name", &File::name, "File name without folders.")
      .def_property_readonly("tensors", &tensors, "dict[str, TensorInfo]; converted once.")
      .def("raw", &raw, "name"_a,
           "Stored bytes of a tensor: a read-only uint8 view into the mapped file.")
      .def("dequantize", &dequantize, "name"_a, "Tensor as float32, in its shape.");

  py::class_<StringArray>(sub, "StringArray",
                          "Strings in a file: a sequence that makes each str when asked for it.")
      .def("__len__", [](const StringArray& array) { return array.texts->size(); })
      .def("__getitem__", &text_at, "index"_a)
      .def("tolist", [](const StringArray& array) { return ToPython{}(*array.texts); });

  py::class_<GgufFile, File, std::shared_ptr<GgufFile>>(sub, "GgufFile", py::dynamic_attr(),
                                                        "A GGUF file, version 2 or 3.")
      .def(py::init<const std::string&>(), "path"_a, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly(
          "metadata", &gguf_metadata,
          "dict[str, Any]; arrays are read-only numpy arrays or StringArray; converted once.");

  py::class_<SafetensorsFile, File, std::shared_ptr<SafetensorsFile>>(
      sub, "SafetensorsFile", py::dynamic_attr(), "A safetensors file.")
      .def(py::init<const std::string&>(), "path"_a, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("metadata", &SafetensorsFile::metadata, "dict[str, str]");
}
