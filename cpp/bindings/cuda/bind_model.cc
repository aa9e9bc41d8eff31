// _cuda.model: the decoder on a device, with the face of _core.model. One call per engine step,
// with the GIL released.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "../decoder_step.h"
#include "../model_config.h"
#include "device_array.h"
#include "sagellm/cuda/decoder.h"
#include "sagellm/cuda/step_shape.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using namespace sagellm;  // NOLINT: a binding file of the core

using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Source = std::tuple<std::string, std::string, std::vector<int64_t>, Bytes, int32_t, bool>;
using kernels::cuda::KvType;

KvType kv_type_of(const std::string& name) {
  if (name == "auto" || name == "bf16") return KvType::kBF16;
  if (name == "f16") return KvType::kF16;
  if (name == "int8") return KvType::kInt8;
  if (name == "fp8") return KvType::kFp8E4M3;
  fail<InvalidArgument>("kv_dtype is '", name, "'; choose auto, bf16, f16, int8 or fp8");
}

const char* kv_type_name(KvType type) {
  switch (type) {
    case KvType::kBF16:
      return "bf16";
    case KvType::kF16:
      return "f16";
    case KvType::kInt8:
      return "int8";
    case KvType::kFp8E4M3:
      break;
  }
  return "fp8";
}

std::unique_ptr<cuda::Decoder> make_decoder(const model::ModelConfig& config,
                                            const std::vector<Source>& sources, int32_t device,
                                            int32_t max_batch_tokens, int32_t max_graph_sequences,
                                            const std::string& kv_dtype, bool deterministic,
                                            bool use_cublas,
                                            const std::vector<std::string>& cublas_folders) {
  cuda::HostTensors tensors;
  for (const auto& [name, format, shape, bytes, heads, add_one] : sources) {
    cuda::HostTensor& tensor = tensors[name];
    tensor = {format_from_name(format), shape, bytes.data(), heads, add_one};
    int64_t needed = row_bytes(tensor.format, shape.empty() ? 1 : shape.back());
    for (size_t i = 0; i + 1 < shape.size(); ++i) needed *= shape[i];
    require<InvalidArgument>(bytes.size() == needed, "tensor '", name, "' has ", bytes.size(),
                             " bytes; its shape and format ask for ", needed);
  }
  cuda::DecoderOptions options;
  options.device = device;
  options.max_batch_tokens = max_batch_tokens;
  options.max_graph_sequences = max_graph_sequences;
  options.kv_type = kv_type_of(kv_dtype);
  options.deterministic = deterministic;
  options.use_cublas = use_cublas;
  options.cublas_folders = cublas_folders;
  const py::gil_scoped_release release;
  return std::make_unique<cuda::Decoder>(config, tensors, options);
}

void def_queue(py::class_<cuda::Decoder>& cls) {
  using bindings::Indices;
  const auto launch = [reader = bindings::RowReader()](
                          cuda::Decoder& decoder, const Indices& token_ids,
                          const Indices& positions, const Indices& query_starts,
                          const Indices& block_tables, const Indices& block_copies,
                          const Indices& logit_rows, const py::sequence& sampling,
                          const std::optional<Indices>& token_sources) {
    const model::ForwardBatch batch = bindings::batch_of(token_ids, positions, query_starts,
                                                         block_tables, block_copies, logit_rows);
    std::vector<py::object> keep;
    const std::vector<sample::RowParams> params =
        bindings::params_of(reader, sampling, decoder.config().vocab_size, keep);
    std::span<const int32_t> sources;
    if (token_sources) sources = bindings::span_of(*token_sources);
    const py::gil_scoped_release release;
    decoder.launch(batch, params, sources);
  };
  cls.def("launch", launch, "token_ids"_a.noconvert(), "positions"_a.noconvert(),
          "query_starts"_a.noconvert(), "block_tables"_a.noconvert(), "block_copies"_a.noconvert(),
          "logit_rows"_a.noconvert(), "sampling"_a, "token_sources"_a.noconvert() = py::none(),
          "Queues a step; see sagellm.backends.interface.QueueingRunner.");
  cls.def(
      "finish",
      [](cuda::Decoder& decoder) {
        cuda::StepResult result;
        {
          const py::gil_scoped_release release;
          result = decoder.wait();
        }
        py::tuple rows(result.sampled.size());
        for (size_t i = 0; i < rows.size(); ++i) {
          rows[i] = bindings::to_tuple(result.sampled[i], result.num_logprobs[i]);
        }
        return rows;
      },
      "Waits for the oldest queued step: tuples as those of `step`.");
}

}  // namespace

void register_model(py::module_& m) {
  py::module_ sub = m.def_submodule("model", "The dense decoder over a paged KV cache.");
  bindings::bind_model_config(sub, py::module_local());
  sub.def("decode_bucket_sizes", &cuda::decode_bucket_sizes, "max_sequences"_a,
          "Numbers of sequences that decode steps are padded to.");

  using cuda::Decoder;
  py::class_<Decoder> decoder(sub, "Decoder", py::module_local(),
                              "Weights on a device, one call per engine step.");
  bindings::def_step<Decoder, cuda::StepOutputs>(
      decoder, "See _core.model.Decoder.step.",
      [](Decoder& d, const model::ForwardBatch& batch, std::span<const sample::RowParams> params,
         const cuda::StepOutputs& outputs) { d.step(batch, params, outputs); });
  def_queue(decoder);
  decoder
      .def(py::init(&make_decoder), py::kw_only(), "config"_a, "sources"_a, "device"_a,
           "max_batch_tokens"_a, "max_graph_sequences"_a = 256, "kv_dtype"_a = "auto",
           "deterministic"_a = false, "use_cublas"_a = true,
           "cublas_folders"_a = std::vector<std::string>{},
           "`sources`: (canonical name, format, shape, stored bytes, unpermute_heads, add_one) "
           "tuples.\n"
           "`deterministic`: results of a sequence do not depend on the rest of the step.")
      .def("allocate_kv", &Decoder::allocate_kv, "num_blocks"_a, "block_size"_a,
           py::call_guard<py::gil_scoped_release>())
      .def("kv_bytes_per_block", &Decoder::kv_bytes_per_block, "block_size"_a)
      .def_property_readonly("kv_dtype", [](const Decoder& d) { return kv_type_name(d.kv_type()); })
      .def_property_readonly("matmul", &Decoder::matmul,
                             "What multiplies: a library or own kernels.")
      .def_property_readonly("free_bytes", &Decoder::free_bytes,
                             "Bytes of the device that nobody has taken yet.")
      .def_property_readonly("weight_bytes", [](const Decoder& d) { return d.weights().bytes(); })
      .def_property_readonly("weight_bytes_per_token",
                             [](const Decoder& d) { return d.weights().bytes_per_token(); })
      .def_property_readonly("kv_bytes", &Decoder::kv_bytes)
      .def_property_readonly("workspace_bytes", &Decoder::workspace_bytes)
      .def_property_readonly("num_graphs", &Decoder::num_graphs, "Recorded decode steps.")
      .def_property_readonly("graph_replays", &Decoder::graph_replays)
      .def_property_readonly("launch_seconds", &Decoder::launch_seconds,
                             "Host time of preparing and queueing the last step.");
}
