// The methods of a decoder that take a step: arrays and SamplingRow objects in, tuples and arrays
// out.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <span>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/model/config.h"
#include "sagellm/model/forward_batch.h"
#include "sampling_rows.h"

namespace sagellm::bindings {

using Indices = py::array_t<int32_t, py::array::c_style>;

inline std::span<const int32_t> span_of(const Indices& array) {
  return {array.data(), static_cast<size_t>(array.size())};
}

/// The arrays of a step; they own what the result points into.
inline model::ForwardBatch batch_of(const Indices& token_ids, const Indices& positions,
                                    const Indices& query_starts, const Indices& block_tables,
                                    const Indices& block_copies, const Indices& logit_rows) {
  require<InvalidArgument>(block_tables.ndim() == 3,
                           "block_tables must have shape [groups, sequences, blocks]");
  require<InvalidArgument>(query_starts.size() >= 2, "a step needs at least one sequence");
  model::ForwardBatch batch;
  batch.token_ids = span_of(token_ids);
  batch.positions = span_of(positions);
  batch.query_starts = span_of(query_starts);
  batch.block_tables = span_of(block_tables);
  batch.block_copies = span_of(block_copies);
  batch.logit_rows = span_of(logit_rows);
  batch.num_groups = static_cast<int32_t>(block_tables.shape(0));
  batch.max_blocks = static_cast<int32_t>(block_tables.shape(2));
  return batch;
}

/// The rules of a step; `keep` owns what they point into.
inline std::vector<sample::RowParams> params_of(const RowReader& reader, const py::sequence& rows,
                                                int64_t vocab, std::vector<py::object>& keep) {
  std::vector<sample::RowParams> params;
  params.reserve(rows.size());
  for (const auto& row : rows) params.push_back(reader.read(row, vocab, keep));
  return params;
}

/// Defines `step` of a class; `run(decoder, batch, params, outputs)` carries it out without the
/// GIL.
template <typename Decoder, typename Outputs, typename Run>
void def_step(py::class_<Decoder>& cls, const char* doc, const Run& run) {
  const auto step = [run, reader = RowReader()](
                        Decoder& decoder, const Indices& token_ids, const Indices& positions,
                        const Indices& query_starts, const Indices& block_tables,
                        const Indices& block_copies, const Indices& logit_rows,
                        const py::sequence& sampling, bool return_logits,
                        bool return_hidden) -> py::tuple {
    const model::ForwardBatch batch =
        batch_of(token_ids, positions, query_starts, block_tables, block_copies, logit_rows);
    const model::ModelConfig& config = decoder.config();
    std::vector<py::object> keep;
    const std::vector<sample::RowParams> params =
        params_of(reader, sampling, config.vocab_size, keep);
    std::vector<sample::Result> results(params.size());
    Outputs outputs;
    outputs.sampled = results;
    const auto matrix = [&](int64_t columns, float** data) {
      py::array_t<float> array(
          {static_cast<py::ssize_t>(logit_rows.size()), static_cast<py::ssize_t>(columns)});
      *data = array.mutable_data();
      return array;
    };
    py::object logits = py::none();
    py::object hidden = py::none();
    if (return_logits) logits = matrix(config.vocab_size, &outputs.logits);
    if (return_hidden) hidden = matrix(config.hidden_size, &outputs.hidden);
    {
      const py::gil_scoped_release release;
      run(decoder, batch, params, outputs);
    }
    return py::make_tuple(to_tuples(results, params), logits, hidden);
  };
  cls.def("step", step, py::arg("token_ids").noconvert(), py::arg("positions").noconvert(),
          py::arg("query_starts").noconvert(), py::arg("block_tables").noconvert(),
          py::arg("block_copies").noconvert(), py::arg("logit_rows").noconvert(),
          py::arg("sampling"), py::arg("return_logits") = false, py::arg("return_hidden") = false,
          doc);
}

}  // namespace sagellm::bindings
