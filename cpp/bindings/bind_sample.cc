// _core.sample: the sampler over rows of logits, for tests; the model's step calls the C++ function
// itself.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/kernels/cpu/dispatch.h"
#include "sagellm/sample/sampler.h"
#include "sampling_rows.h"

namespace py = pybind11;

namespace {

using namespace sagellm;  // NOLINT: a binding file of the core

py::tuple sample_rows(const py::array_t<float, py::array::c_style>& logits,
                      const py::sequence& rows, const std::string& isa) {
  require<InvalidArgument>(
      logits.ndim() == 2 && static_cast<size_t>(logits.shape(0)) == rows.size(),
      "logits must have shape [rows, vocab] with one row per entry of rows");
  const int64_t vocab = logits.shape(1);
  std::vector<py::object> keep;
  std::vector<sample::RowParams> params;
  const bindings::RowReader reader;
  for (const auto& row : rows) params.push_back(reader.read(row, vocab, keep));
  const kernels::KernelTable& table = kernels::kernel_table(isa);
  std::vector<sample::Result> results;
  {
    py::gil_scoped_release release;
    sample::Scratch scratch;
    for (size_t i = 0; i < params.size(); ++i) {
      results.push_back(sample::sample_row(logits.data() + static_cast<int64_t>(i) * vocab, vocab,
                                           params[i], table, scratch));
    }
  }
  return bindings::to_tuples(results, params);
}

}  // namespace

void register_sample(py::module_& m) {
  py::module_ s = m.def_submodule("sample", "The sampler.");
  s.def("sample_rows", &sample_rows, py::arg("logits").noconvert(), py::arg("rows"),
        py::arg("isa") = "generic",
        "Samples one token per row of logits [R, vocab]; `rows` are SamplingRow objects. Returns "
        "tuples\n"
        "(token_id, logprob | None, top_ids, top_logprobs, error | None).");
}
