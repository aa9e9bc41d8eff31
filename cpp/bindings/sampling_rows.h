// SamplingRow objects to RowParams and back; shared by the sampler's and the model's bindings.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/sample/sampler.h"

namespace sagellm::bindings {

namespace py = pybind11;

/// RowParams from an object with the attributes of backends.interface.SamplingRow; `keep` owns what
/// it points into.
inline sample::RowParams to_params(const py::handle& row, int64_t vocab,
                                   std::vector<py::object>& keep) {
  const auto array = [&](const char* name, auto element) -> py::array {
    const py::object value = row.attr(name);
    if (value.is_none()) return py::array();
    using T = decltype(element);
    require<InvalidArgument>(py::isinstance<py::array_t<T, py::array::c_style>>(value), name,
                             " must be a contiguous ",
                             py::str(py::dtype::of<T>()).template cast<std::string>(), " array");
    keep.push_back(value);
    return value.cast<py::array>();
  };
  sample::RowParams p;
  p.temperature = row.attr("temperature").cast<double>();
  p.top_k = row.attr("top_k").cast<int64_t>();
  p.top_p = row.attr("top_p").cast<double>();
  p.min_p = row.attr("min_p").cast<double>();
  p.repetition_penalty = row.attr("repetition_penalty").cast<float>();
  p.presence_penalty = row.attr("presence_penalty").cast<float>();
  p.frequency_penalty = row.attr("frequency_penalty").cast<float>();
  p.prompt_length = row.attr("prompt_length").cast<int64_t>();
  p.position = row.attr("position").cast<uint64_t>();
  p.num_logprobs = row.attr("num_logprobs").cast<int32_t>();
  p.forced_token = row.attr("forced_token").cast<int32_t>();
  const py::int_ mask(0xFFFFFFFFFFFFFFFFull);
  p.seed = row.attr("seed").attr("__and__")(mask).cast<uint64_t>();

  const py::array ids = array("bias_ids", int32_t{}), values = array("bias_values", float{});
  require<InvalidArgument>(ids.size() == values.size(), "bias_ids and bias_values have ",
                           ids.size(), " and ", values.size(), " elements");
  if (ids.size() > 0) {
    p.bias_ids = static_cast<const int32_t*>(ids.data());
    p.bias_values = static_cast<const float*>(values.data());
    p.num_bias = ids.size();
  }
  const bool no_history = row.attr("history").is_none();
  const py::array history = array("history", int32_t{});
  if (!no_history) {
    p.history = static_cast<const int32_t*>(history.data());
    p.history_length = history.size();
  } else {
    require<InvalidArgument>(
        p.repetition_penalty == 1.f && p.presence_penalty == 0.f && p.frequency_penalty == 0.f,
        "penalties need the token history");
  }
  if (!row.attr("allowed").is_none()) {
    const py::array allowed = array("allowed", uint32_t{});
    require<InvalidArgument>(allowed.size() == (vocab + 31) / 32, "allowed has ", allowed.size(),
                             " words, must have ", (vocab + 31) / 32);
    p.allowed = static_cast<const uint32_t*>(allowed.data());
  }
  return p;
}

/// (token_id, logprob | None, top_ids, top_logprobs, error | None).
inline py::tuple to_tuple(const sample::Result& r, const sample::RowParams& params) {
  const bool reported = params.num_logprobs >= 0 && r.error.empty();
  return py::make_tuple(r.token_id,
                        reported ? py::object(py::float_(r.logprob)) : py::object(py::none()),
                        py::tuple(py::cast(r.top_ids)), py::tuple(py::cast(r.top_logprobs)),
                        r.error.empty() ? py::object(py::none()) : py::object(py::str(r.error)));
}

}  // namespace sagellm::bindings
