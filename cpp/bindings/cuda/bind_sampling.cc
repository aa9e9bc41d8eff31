// Sampling on arrays of a device.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "../sampling_rows.h"
#include "device_array.h"
#include "sagellm/cuda/stream.h"
#include "sagellm/kernels/cuda/sampling.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using namespace sagellm;                 // NOLINT: a binding file of the core
using namespace sagellm::kernels::cuda;  // NOLINT

/// Device copies that must outlive the call.
class Uploads {
 public:
  template <typename T>
  T* add(const T* values, int64_t count) {
    T* to = reserve<T>(count);
    cuda::copy_to_device(to, values, static_cast<size_t>(count) * sizeof(T), nullptr);
    return to;
  }
  template <typename T>
  T* reserve(int64_t count) {
    buffers_.emplace_back(static_cast<size_t>(count) * sizeof(T));
    return buffers_.back().as<T>();
  }

 private:
  std::vector<cuda::DeviceBuffer> buffers_;
};

bool has_penalties(const sample::RowParams& row) {
  return row.repetition_penalty != 1.f || row.presence_penalty != 0.f ||
         row.frequency_penalty != 0.f;
}

uint32_t* counts_of(const sample::RowParams& row, int32_t vocab, Uploads& uploads) {
  auto* counts = uploads.reserve<uint32_t>(vocab);
  cuda::fill(counts, 0, static_cast<size_t>(vocab) * 4, nullptr);
  const int32_t* history = uploads.add(row.history, row.history_length);
  const auto prompt = static_cast<int32_t>(std::min(row.prompt_length, row.history_length));
  const auto output = static_cast<int32_t>(row.history_length) - prompt;
  count_tokens({history, counts, prompt, true}, nullptr);
  count_tokens({history + prompt, counts, output, false}, nullptr);
  return counts;
}

SamplingRow device_row(const sample::RowParams& row, int32_t vocab, Uploads& uploads) {
  require<InvalidArgument>(row.num_logprobs <= kMaxTopLogprobs, "num_logprobs is ",
                           row.num_logprobs, "; the device reports up to ", kMaxTopLogprobs);
  SamplingRow out;
  out.temperature = row.temperature;
  out.top_p = row.top_p;
  out.min_p = row.min_p;
  out.uniform_bits = uniform_bits(row.seed, row.position);
  out.top_k = static_cast<int32_t>(std::min<int64_t>(row.top_k, vocab));
  out.repetition_penalty = row.repetition_penalty;
  out.presence_penalty = row.presence_penalty;
  out.frequency_penalty = row.frequency_penalty;
  out.num_logprobs = row.num_logprobs;
  out.forced_token = row.forced_token;
  if (row.num_bias > 0) {
    out.num_bias = static_cast<int32_t>(row.num_bias);
    out.bias_ids = uploads.add(row.bias_ids, row.num_bias);
    out.bias_values = uploads.add(row.bias_values, row.num_bias);
  }
  if (row.allowed != nullptr) out.allowed = uploads.add(row.allowed, (vocab + 31) / 32);
  if (has_penalties(row)) out.counts = counts_of(row, vocab, uploads);
  if (out.num_bias > 0 || out.allowed != nullptr || out.counts != nullptr) {
    out.adjusted = uploads.reserve<float>(vocab);
  }
  return out;
}

const char* error_of(SampleStatus status) {
  switch (status) {
    case SampleStatus::kNotFinite:
      return "logits are not finite";
    case SampleStatus::kNoneAllowed:
      return "no token is allowed";
    case SampleStatus::kAdjustedNotFinite:
      return "logits are not finite after bias and penalties";
    case SampleStatus::kChosen:
      break;
  }
  return "";
}

sample::Result result_of(const SampledToken& token, const SamplingRow& row, int32_t vocab) {
  sample::Result result;
  result.token_id = token.token_id;
  result.error = error_of(token.status);
  if (!result.error.empty() || row.num_logprobs < 0) return result;
  result.logprob = token.logprob;
  const int count = std::min(row.num_logprobs, vocab);
  result.top_ids.assign(token.top_ids, token.top_ids + count);
  result.top_logprobs.assign(token.top_logprobs, token.top_logprobs + count);
  return result;
}

py::tuple sample_rows(const DeviceArray& logits, const py::sequence& rows) {
  require<InvalidArgument>(
      logits.shape().size() == 2 && logits.shape()[0] == static_cast<py::ssize_t>(rows.size()),
      "logits must be [rows, stride] with one row per rule");
  SamplingParams p;
  p.num_rows = static_cast<int32_t>(rows.size());
  p.logits_stride = logits.shape()[1];
  p.vocab = static_cast<int32_t>(p.logits_stride);
  require<InvalidArgument>(p.vocab % 4 == 0 || p.num_rows == 1,
                           "rows of logits must be a multiple of 4 apart");
  require<InvalidArgument>(p.vocab <= kMaxSamplingVocab, "the vocabulary has ", p.vocab,
                           " tokens; the kernels take ", kMaxSamplingVocab);
  p.logits = logits.elements<float>("logits", logits.size());
  std::vector<py::object> keep;
  Uploads uploads;
  std::vector<sample::RowParams> params;
  std::vector<SamplingRow> device_rows;
  const bindings::RowReader reader;
  for (const py::handle row : rows) {
    params.push_back(reader.read(row, p.vocab, keep));
    device_rows.push_back(device_row(params.back(), p.vocab, uploads));
  }
  p.rows = uploads.add(device_rows.data(), p.num_rows);
  p.out = uploads.reserve<SampledToken>(p.num_rows);
  p.workspace = uploads.reserve<std::byte>(
      static_cast<int64_t>(sampling_workspace_bytes(p.num_rows, p.vocab)));
  std::vector<SampledToken> tokens(rows.size());
  kernels::cuda::sample_tokens(p, nullptr);
  cuda::copy_to_host(tokens.data(), p.out, tokens.size() * sizeof(SampledToken), nullptr);
  cuda::synchronize(nullptr);
  std::vector<sample::Result> results;
  for (size_t i = 0; i < tokens.size(); ++i) {
    results.push_back(result_of(tokens[i], device_rows[i], p.vocab));
  }
  return bindings::to_tuples(results, params);
}

}  // namespace

void register_sampling(py::module_& m) {
  m.def("sample", &sample_rows, "logits"_a, "rows"_a,
        "Chooses a token for each row of float32 logits by its SamplingRow: tuples (token_id, "
        "logprob, top_ids, top_logprobs, error).");
}
