// _core.kernels: how long kernels take, and what the machine could do at most.
#include <pybind11/pybind11.h>

#include <string>

#include "sagellm/base/error.h"
#include "sagellm/bench/kernel_benchmark.h"
#include "sagellm/kernels/cpu/dispatch.h"
#include "sagellm/kv/kv_storage.h"
#include "sagellm/quant/pack.h"
#include "sagellm/runtime/compute_probe.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using namespace sagellm;  // NOLINT: a binding file of the core

bench::Run run_of(const std::string& isa, int threads, double seconds) {
  return {kernels::kernel_table(isa), threads, seconds};
}

py::dict to_dict(const runtime::Timing& timing) {
  return py::dict("median"_a = timing.median, "best"_a = timing.best, "rounds"_a = timing.rounds);
}

/// Calls `time` without the GIL.
template <typename Time>
py::dict measured(const Time& time) {
  runtime::Timing timing;
  {
    const py::gil_scoped_release release;
    timing = time();
  }
  return to_dict(timing);
}

kernels::ActKind kind_of(const std::string& name) {
  if (name == "f32") return kernels::ActKind::kF32;
  if (name == "bf16") return kernels::ActKind::kBF16;
  require<InvalidArgument>(name == "i8", "arithmetic is '", name, "', must be f32, bf16 or i8");
  return kernels::ActKind::kI8;
}

std::string arithmetic_of(const std::string& isa, const quant::PackedMatrix& weights) {
  switch (kernels::kernel_table(isa).act_kind[static_cast<size_t>(weights.format)]) {
    case kernels::ActKind::kF32:
      return "f32";
    case kernels::ActKind::kBF16:
      return "bf16";
    case kernels::ActKind::kI8:
      break;
  }
  return "i8";
}

py::dict time_matmul(const std::string& isa, const quant::PackedMatrix& packed, int32_t num_tokens,
                     int threads, double seconds, const std::string& precision, int32_t copies) {
  require<InvalidArgument>(precision == "a8" || precision == "a15", "precision is '", precision,
                           "', must be \"a8\" or \"a15\"");
  const auto level = precision == "a15" ? model::Precision::kA15 : model::Precision::kA8;
  const bench::Run run = run_of(isa, threads, seconds);
  return measured([&] { return bench::time_matmul(run, packed, num_tokens, level, copies); });
}

py::dict arithmetic_peak(const std::string& isa, const std::string& arithmetic, int threads,
                         double seconds) {
  const kernels::ActKind kind = kind_of(arithmetic);
  runtime::ArithmeticPeak peak;
  {
    const py::gil_scoped_release release;
    peak = runtime::arithmetic_peak(isa, kind, threads, seconds);
  }
  return py::dict("instruction"_a = peak.instruction, "ops_per_second"_a = peak.ops_per_second);
}

}  // namespace

void register_kernels_benchmark(py::module_& m) {
  py::module_ k =
      m.def_submodule("kernels", "Kernels by instruction set, for tests and benchmarks.");
  k.def("arithmetic_of", &arithmetic_of, "isa"_a, "packed"_a,
        "What a matmul multiplies activations as: \"f32\", \"bf16\" or \"i8\".");
  k.def(
      "arithmetic_peak", &arithmetic_peak, "isa"_a, "arithmetic"_a, "threads"_a, "seconds"_a,
      "The most multiplications and additions per second: {\"instruction\", \"ops_per_second\"}.");
  k.def("memory_bandwidth", &runtime::memory_bandwidth, "isa"_a, "threads"_a, "bytes"_a,
        "seconds"_a, py::call_guard<py::gil_scoped_release>(),
        "Bytes per second of reading `bytes` of huge-page memory, in rounds of 4 MiB per thread.");
  k.def("cache_bandwidth", &runtime::cache_bandwidth, "isa"_a, "threads"_a, "seconds"_a,
        py::call_guard<py::gil_scoped_release>(),
        "Bytes per second of loads from each thread's L2 cache.");
  // Each returns seconds of one round: {"median", "best", "rounds"}.
  k.def("time_matmul", &time_matmul, "isa"_a, "packed"_a, "num_tokens"_a, "threads"_a, "seconds"_a,
        "precision"_a = "a8", "copies"_a = 1,
        "Seconds of one matmul, without encoding the activations: {\"median\", \"best\", "
        "\"rounds\"}. `copies` of the\nweights are used in turn.");
  using TimePages = runtime::Timing (*)(const bench::Run&, const bench::AttentionShape&);
  const auto def_pages = [&k](const char* name, TimePages time, const char* text) {
    k.def(
        name,
        [time](const std::string& isa, int32_t kv_heads, int32_t group, int32_t head_dim,
               int32_t context, int32_t num_tokens, int threads, double seconds, int32_t layers,
               int32_t sequences, const std::string& kv_dtype) {
          const bench::Run run = run_of(isa, threads, seconds);
          const bench::AttentionShape shape{.num_kv_heads = kv_heads,
                                            .group = group,
                                            .head_dim = head_dim,
                                            .context = context,
                                            .num_tokens = num_tokens,
                                            .num_layers = layers,
                                            .num_sequences = sequences,
                                            .dtype = kv::dtype_from_name(kv_dtype)};
          return measured([&] { return time(run, shape); });
        },
        "isa"_a, py::kw_only(), "kv_heads"_a, "group"_a, "head_dim"_a, "context"_a, "num_tokens"_a,
        "threads"_a, "seconds"_a, "layers"_a = 1, "sequences"_a = 1, "kv_dtype"_a = "bf16", text);
  };
  def_pages("time_attention", &bench::time_attention,
            "Seconds of attention of the last `num_tokens` of `context` positions, merge included; "
            "`layers` of\n`sequences` are used in turn.");
  def_pages("time_kv_write", &bench::time_kv_write,
            "Seconds of writing K and V of the last `num_tokens` of `context` positions.");
  k.def(
      "time_rows",
      [](const std::string& isa, const std::string& kernel, int64_t rows, int64_t columns,
         int threads, double seconds) {
        const bench::Run run = run_of(isa, threads, seconds);
        return measured([&] { return bench::time_rows(run, kernel, rows, columns); });
      },
      "isa"_a, "kernel"_a, "rows"_a, "columns"_a, "threads"_a, "seconds"_a,
      "Seconds of a row-wise kernel over `rows` rows per thread.");
  k.def(
      "time_sampler",
      [](const std::string& isa, int64_t vocab, double temperature, int64_t top_k, double top_p,
         int threads, double seconds) {
        const bench::Run run = run_of(isa, threads, seconds);
        return measured([&] { return bench::time_sampler(run, vocab, temperature, top_k, top_p); });
      },
      "isa"_a, "vocab"_a, "temperature"_a, "top_k"_a, "top_p"_a, "threads"_a, "seconds"_a,
      "Seconds of choosing one token per thread.");
}
