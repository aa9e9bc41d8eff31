// _core.model: the decoder. One call per engine step, with the GIL released.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "decoder_step.h"
#include "model_config.h"
#include "sagellm/checkpoint/file.h"
#include "sagellm/kv/kv_storage.h"
#include "sagellm/model/decoder.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using namespace sagellm;  // NOLINT: a binding file of the core

using Source =
    std::tuple<std::string, std::shared_ptr<checkpoint::File>, std::string, int32_t, bool>;

std::unique_ptr<model::Decoder> make_decoder(const model::ModelConfig& config,
                                             const std::vector<Source>& sources,
                                             int32_t num_threads, int32_t max_batch_tokens,
                                             bool accurate, const std::string& isa) {
  model::TensorSources named;
  for (const auto& [name, file, tensor, heads, add_one] : sources) {
    named[name] = model::TensorSource{file, tensor, heads, add_one};
  }
  model::DecoderOptions options;
  options.num_threads = num_threads;
  options.max_batch_tokens = max_batch_tokens;
  options.precision = accurate ? model::Precision::kA15 : model::Precision::kA8;
  options.isa = isa;
  const py::gil_scoped_release release;
  return std::make_unique<model::Decoder>(config, named, options);
}

py::dict phase_times(model::Decoder& decoder) {
  const model::PhaseTimer& timer = decoder.phase_timer();
  py::list threads;
  for (const model::PhaseTimer::ThreadTimes& times : timer.threads()) {
    py::dict phases;
    for (size_t i = 0; i < model::kNumPhases; ++i) {
      phases[py::str(model::phase_name(static_cast<model::Phase>(i)))] =
          static_cast<double>(times.ns[i]) * 1e-9;
    }
    threads.append(phases);
  }
  return py::dict("steps"_a = timer.num_steps(),
                  "seconds"_a = static_cast<double>(timer.step_ns()) * 1e-9, "threads"_a = threads);
}

}  // namespace

void register_model(py::module_& m) {
  py::module_ sub = m.def_submodule("model", "The dense decoder over a paged KV cache.");

  bindings::bind_model_config(sub);

  using model::Decoder;
  py::class_<Decoder> decoder(sub, "Decoder",
                              "Weights on all threads of a pool, one call per engine step.");
  bindings::def_step<Decoder, model::StepOutputs>(
      decoder,
      "Runs one step; returns (rows, logits | None, hidden | None). Rows are tuples (token_id,\n"
      "logprob | None, top_ids, top_logprobs, error | None), one per entry of `sampling`.\n"
      "Hidden states are those after the final norm.",
      [](Decoder& d, const model::ForwardBatch& batch, std::span<const sample::RowParams> params,
         const model::StepOutputs& outputs) { d.step(batch, params, outputs); });
  decoder
      .def(py::init(&make_decoder), "config"_a, "sources"_a, "num_threads"_a, "max_batch_tokens"_a,
           "accurate"_a = false, "isa"_a = "",
           "`sources`: (canonical name, file, tensor, unpermute_heads, add_one) tuples. `accurate` "
           "selects 15-bit\n"
           "activations for quantized weights.")
      .def("attach_kv", &Decoder::attach_kv, "storage"_a)
      .def(
          "time_phases", [](Decoder& d, bool enabled) { d.phase_timer().enable(enabled); },
          "enabled"_a,
          "Starts timing the phases of steps from zero, or stops. Not while a step runs.")
      .def("phase_times", &phase_times,
           "Of the steps since then: {\"steps\", \"seconds\" inside `step`, \"threads\": per "
           "thread {phase: seconds},\nwhich add up to \"seconds\"}.")
      .def_property_readonly("isa", [](const Decoder& d) { return d.kernels().name; })
      .def_property_readonly("num_threads", &Decoder::num_threads)
      .def_property_readonly("weight_bytes", [](const Decoder& d) { return d.weights().bytes(); })
      .def_property_readonly("weight_bytes_per_token",
                             [](const Decoder& d) { return d.weights().bytes_per_token(); })
      .def_property_readonly("workspace_bytes", &Decoder::workspace_bytes)
      .def_property_readonly("last_head_blocks", &Decoder::last_head_blocks,
                             "Row blocks (of 16) of the output head that the last step computed.");
}
