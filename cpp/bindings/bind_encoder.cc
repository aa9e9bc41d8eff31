// _core.encoder: BERT-family encoders. One call per batch, with the GIL released.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/checkpoint/file.h"
#include "sagellm/model/encoder.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using namespace sagellm;  // NOLINT: a binding file of the core

using Indices = py::array_t<int32_t, py::array::c_style>;
using Floats = py::array_t<float>;
using Source = std::tuple<std::string, std::shared_ptr<checkpoint::File>, std::string>;

std::span<const int32_t> span_of(const Indices& array) {
  return {array.data(), static_cast<size_t>(array.size())};
}

std::unique_ptr<model::Encoder> make_encoder(const model::EncoderConfig& config,
                                             const std::vector<Source>& sources,
                                             int32_t num_threads, int32_t max_batch_tokens,
                                             const std::string& isa) {
  model::TensorSources named;
  for (const auto& [name, file, tensor] : sources)
    named[name] = model::TensorSource{file, tensor, 0, false};
  const py::gil_scoped_release release;
  return std::make_unique<model::Encoder>(
      config, named, model::EncoderOptions{num_threads, max_batch_tokens, isa});
}

model::EncoderBatch batch_of(const Indices& token_ids, const Indices& token_types,
                             const Indices& query_starts) {
  require<InvalidArgument>(
      token_ids.ndim() == 1 && token_types.ndim() == 1 && query_starts.ndim() == 1,
      "token_ids, token_types and query_starts must have one axis");
  require<InvalidArgument>(query_starts.size() >= 2, "a batch needs at least one sequence");
  return {span_of(token_ids), span_of(token_types), span_of(query_starts)};
}

void run(model::Encoder& encoder, const model::EncoderBatch& batch,
         const model::EncoderOutputs& outputs) {
  const py::gil_scoped_release release;
  encoder.run(batch, outputs);
}

Floats hidden(model::Encoder& encoder, const Indices& token_ids, const Indices& token_types,
              const Indices& query_starts) {
  const model::EncoderBatch batch = batch_of(token_ids, token_types, query_starts);
  Floats out({static_cast<py::ssize_t>(batch.num_tokens()),
              static_cast<py::ssize_t>(encoder.config().hidden_size)});
  model::EncoderOutputs outputs;
  outputs.hidden = out.mutable_data();
  run(encoder, batch, outputs);
  return out;
}

Floats embed(model::Encoder& encoder, const Indices& token_ids, const Indices& token_types,
             const Indices& query_starts, const std::string& pooling, bool normalize) {
  require<InvalidArgument>(pooling == "mean" || pooling == "cls", "pooling is '", pooling,
                           "'; choose 'mean' or 'cls'");
  const model::EncoderBatch batch = batch_of(token_ids, token_types, query_starts);
  Floats out({static_cast<py::ssize_t>(batch.num_sequences()),
              static_cast<py::ssize_t>(encoder.config().hidden_size)});
  model::EncoderOutputs outputs;
  outputs.pooled = out.mutable_data();
  outputs.pooling = pooling == "mean" ? model::Pooling::kMean : model::Pooling::kCls;
  outputs.normalize = normalize;
  run(encoder, batch, outputs);
  return out;
}

Floats score(model::Encoder& encoder, const Indices& token_ids, const Indices& token_types,
             const Indices& query_starts) {
  const model::EncoderBatch batch = batch_of(token_ids, token_types, query_starts);
  Floats out(static_cast<py::ssize_t>(batch.num_sequences()));
  model::EncoderOutputs outputs;
  outputs.scores = out.mutable_data();
  run(encoder, batch, outputs);
  return out;
}

}  // namespace

void register_encoder(py::module_& m) {
  py::module_ sub = m.def_submodule("encoder", "BERT-family encoders over ragged batches.");

  using model::EncoderConfig;
  py::class_<EncoderConfig>(sub, "EncoderConfig",
                            "Shape of an encoder; see sagellm.checkpoint.encoder.EncoderConfig.")
      .def(py::init<>())
      .def_readwrite("vocab_size", &EncoderConfig::vocab_size)
      .def_readwrite("hidden_size", &EncoderConfig::hidden_size)
      .def_readwrite("intermediate_size", &EncoderConfig::intermediate_size)
      .def_readwrite("num_layers", &EncoderConfig::num_layers)
      .def_readwrite("num_heads", &EncoderConfig::num_heads)
      .def_readwrite("num_positions", &EncoderConfig::num_positions)
      .def_readwrite("position_offset", &EncoderConfig::position_offset)
      .def_readwrite("num_token_types", &EncoderConfig::num_token_types)
      .def_readwrite("norm_eps", &EncoderConfig::norm_eps)
      .def_readwrite("has_head", &EncoderConfig::has_head);

  using model::Encoder;
  py::class_<Encoder>(sub, "Encoder",
                      "Weights on all threads of a pool, one call per batch. Sequence s of a "
                      "batch owns the tokens\n"
                      "query_starts[s]:query_starts[s+1]. Not to be called from two threads at "
                      "once.")
      .def(py::init(&make_encoder), "config"_a, "sources"_a, "num_threads"_a, "max_batch_tokens"_a,
           "isa"_a = "", "`sources`: (canonical name, file, tensor) tuples.")
      .def("hidden", &hidden, "token_ids"_a.noconvert(), "token_types"_a.noconvert(),
           "query_starts"_a.noconvert(), "The last layer's states, [tokens, hidden_size].")
      .def("embed", &embed, "token_ids"_a.noconvert(), "token_types"_a.noconvert(),
           "query_starts"_a.noconvert(), "pooling"_a, "normalize"_a,
           "Pooled states, [sequences, hidden_size]; `pooling` is \"mean\" or \"cls\".")
      .def("score", &score, "token_ids"_a.noconvert(), "token_types"_a.noconvert(),
           "query_starts"_a.noconvert(),
           "The cross-encoder head's output before any activation, [sequences].")
      .def_property_readonly("isa", [](const Encoder& e) { return e.kernels().name; })
      .def_property_readonly("num_threads", &Encoder::num_threads)
      .def_property_readonly("weight_bytes", &Encoder::weight_bytes)
      .def_property_readonly("workspace_bytes", &Encoder::workspace_bytes);
}
