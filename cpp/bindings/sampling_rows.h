// SamplingRow objects to RowParams and back; shared by the sampler's and the models' bindings.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/sample/sampler.h"

namespace sagellm::bindings {

namespace py = pybind11;

/// Reads objects with the attributes of backends.interface.SamplingRow. Made once and kept: it
/// holds the attributes' names as interned strings, which Python's type cache knows.
class __attribute__((visibility("hidden"))) RowReader {
 public:
  /// RowParams of a row; `keep` owns what they point into.
  sample::RowParams read(py::handle row, int64_t vocab, std::vector<py::object>& keep) const {
    sample::RowParams p;
    p.temperature = get(row, temperature_).cast<double>();
    p.top_k = get(row, top_k_).cast<int64_t>();
    p.top_p = get(row, top_p_).cast<double>();
    p.min_p = get(row, min_p_).cast<double>();
    p.repetition_penalty = get(row, repetition_penalty_).cast<float>();
    p.presence_penalty = get(row, presence_penalty_).cast<float>();
    p.frequency_penalty = get(row, frequency_penalty_).cast<float>();
    p.prompt_length = get(row, prompt_length_).cast<int64_t>();
    p.position = get(row, position_).cast<uint64_t>();
    p.num_logprobs = get(row, num_logprobs_).cast<int32_t>();
    p.forced_token = get(row, forced_token_).cast<int32_t>();
    p.seed = PyLong_AsUnsignedLongLongMask(get(row, seed_).ptr());  // modulo 2^64
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();

    const auto ids = array<int32_t>(row, bias_ids_, keep);
    const auto values = array<float>(row, bias_values_, keep);
    require<InvalidArgument>(ids.size() == values.size(), "bias_ids and bias_values have ",
                             ids.size(), " and ", values.size(), " elements");
    if (!ids.empty()) {
      p.bias_ids = ids.data();
      p.bias_values = values.data();
      p.num_bias = static_cast<int64_t>(ids.size());
    }
    const auto history = array<int32_t>(row, history_, keep);
    p.history = history.data();
    p.history_length = static_cast<int64_t>(history.size());
    require<InvalidArgument>(
        p.history != nullptr || (p.repetition_penalty == 1.f && p.presence_penalty == 0.f &&
                                 p.frequency_penalty == 0.f),
        "penalties need the token history");
    const auto allowed = array<uint32_t>(row, allowed_, keep);
    require<InvalidArgument>(
        allowed.data() == nullptr || static_cast<int64_t>(allowed.size()) == (vocab + 31) / 32,
        "allowed has ", allowed.size(), " words, must have ", (vocab + 31) / 32);
    p.allowed = allowed.data();
    return p;
  }

 private:
  static py::object interned(const char* name) {
    return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name));
  }

  static py::object get(py::handle row, const py::object& name) {
    PyObject* value = PyObject_GetAttr(row.ptr(), name.ptr());
    if (value == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
  }

  /// The elements of an array, without data if the attribute is None.
  template <typename T>
  static std::span<const T> array(py::handle row, const py::object& name,
                                  std::vector<py::object>& keep) {
    const py::object value = get(row, name);
    if (value.is_none()) return {};
    using Array = py::array_t<T, py::array::c_style>;
    require<InvalidArgument>(py::isinstance<Array>(value), name.cast<std::string>(),
                             " must be a contiguous ",
                             py::str(py::dtype::of<T>()).template cast<std::string>(), " array");
    keep.push_back(value);
    const auto elements = py::reinterpret_borrow<Array>(value);
    return {elements.data(), static_cast<size_t>(elements.size())};
  }

  const py::object temperature_ = interned("temperature"), top_k_ = interned("top_k"),
                   top_p_ = interned("top_p"), min_p_ = interned("min_p"),
                   repetition_penalty_ = interned("repetition_penalty"),
                   presence_penalty_ = interned("presence_penalty"),
                   frequency_penalty_ = interned("frequency_penalty"),
                   prompt_length_ = interned("prompt_length"), position_ = interned("position"),
                   num_logprobs_ = interned("num_logprobs"),
                   forced_token_ = interned("forced_token"), seed_ = interned("seed"),
                   bias_ids_ = interned("bias_ids"), bias_values_ = interned("bias_values"),
                   history_ = interned("history"), allowed_ = interned("allowed");
};

/// (token_id, logprob | None, top_ids, top_logprobs, error | None).
inline py::tuple to_tuple(const sample::Result& r, int32_t num_logprobs) {
  const bool reported = num_logprobs >= 0 && r.error.empty();
  const auto elements = [](const auto& values) {
    return values.empty() ? py::tuple() : py::tuple(py::cast(values));
  };
  return py::make_tuple(r.token_id,
                        reported ? py::object(py::float_(r.logprob)) : py::object(py::none()),
                        elements(r.top_ids), elements(r.top_logprobs),
                        r.error.empty() ? py::object(py::none()) : py::object(py::str(r.error)));
}

/// The results of rows as a tuple of tuples.
inline py::tuple to_tuples(std::span<const sample::Result> results,
                           std::span<const sample::RowParams> params) {
  py::tuple rows(results.size());
  for (size_t i = 0; i < results.size(); ++i)
    rows[i] = to_tuple(results[i], params[i].num_logprobs);
  return rows;
}

}  // namespace sagellm::bindings
