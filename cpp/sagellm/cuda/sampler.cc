#include "sagellm/cuda/sampler.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>

#include "sagellm/base/error.h"
#include "sagellm/base/math.h"

namespace sagellm::cuda {

namespace {

using kernels::cuda::SampledToken;
using kernels::cuda::SampleStatus;
using kernels::cuda::SamplingRow;
using sample::RowParams;

bool has_penalties(const RowParams& row) {
  return row.repetition_penalty != 1.f || row.presence_penalty != 0.f ||
         row.frequency_penalty != 0.f;
}
bool counts_tokens(const RowParams& row) { return has_penalties(row) && row.history_length > 0; }
bool adjusts(const RowParams& row) {
  return row.num_bias > 0 || row.allowed != nullptr || counts_tokens(row);
}

/// Gives out 16-byte aligned pieces of a run of bytes.
class Pieces {
 public:
  size_t take(size_t bytes) {
    const size_t begin = end_;
    end_ = static_cast<size_t>(round_up(static_cast<int64_t>(end_ + bytes), 16));
    return begin;
  }
  size_t end() const { return end_; }

 private:
  size_t end_ = 0;
};

size_t allowed_bytes(int32_t vocab) { return static_cast<size_t>((vocab + 31) / 32) * 4; }

std::string error_of(const RowParams& row, int64_t vocab) {
  try {
    sample::validate(row, vocab);
    require<InvalidArgument>(row.num_logprobs <= kernels::cuda::kMaxTopLogprobs, "num_logprobs is ",
                             row.num_logprobs, "; a CUDA device reports at most ",
                             kernels::cuda::kMaxTopLogprobs);
  } catch (const std::exception& error) {
    return error.what();
  }
  return {};
}

void grow(DeviceBuffer& buffer, int64_t bytes, const Stream& stream) {
  if (static_cast<int64_t>(buffer.size()) >= bytes) return;
  stream.synchronize();
  buffer = DeviceBuffer();
  buffer = DeviceBuffer(static_cast<size_t>(bytes));
}

const char* reason(SampleStatus status) {
  switch (status) {
    case SampleStatus::kChosen:
      return "";
    case SampleStatus::kNotFinite:
      return "logits are not finite";
    case SampleStatus::kNoneAllowed:
      return "no token is allowed";
    case SampleStatus::kAdjustedNotFinite:
      break;
  }
  return "logits are not finite after bias and penalties";
}

}  // namespace

std::vector<sample::Result> Choices::results() const {
  std::vector<sample::Result> results(errors.size());
  for (size_t i = 0; i < results.size(); ++i) {
    const SampledToken& from = tokens.as<SampledToken>()[i];
    sample::Result& result = results[i];
    result.error = errors[i].empty() ? reason(from.status) : errors[i];
    if (!result.error.empty()) continue;
    result.token_id = from.token_id;
    result.logprob = from.logprob;
    const int32_t top = std::max(num_logprobs[i], 0);
    result.top_ids.assign(from.top_ids, from.top_ids + top);
    result.top_logprobs.assign(from.top_logprobs, from.top_logprobs + top);
  }
  return results;
}

Sampler::Sampler(int64_t vocab, int64_t logits_stride, int32_t max_rows, int32_t pass_rows)
    : vocab_(static_cast<int32_t>(vocab)), stride_(logits_stride), pass_rows_(pass_rows) {
  require<Unsupported>(vocab <= kernels::cuda::kMaxSamplingVocab, "the vocabulary has ", vocab,
                       " tokens; a CUDA device samples from at most ",
                       kernels::cuda::kMaxSamplingVocab);
  workspace_ = DeviceBuffer(kernels::cuda::sampling_workspace_bytes(pass_rows, vocab_));
  sampled_ = DeviceBuffer(static_cast<size_t>(max_rows) * sizeof(SampledToken));
}

size_t Sampler::bytes() const {
  return adjusted_.size() + counts_.size() + workspace_.size() + sampled_.size();
}

size_t Sampler::measure(std::span<const RowParams> rows, int32_t padding, Choices& choices,
                        const Stream& stream) {
  choices.errors.assign(rows.size(), {});
  choices.num_logprobs.assign(rows.size(), -1);
  Pieces pieces;
  pieces.take((rows.size() + static_cast<size_t>(padding)) * sizeof(SamplingRow));
  int64_t adjusted = 0, counted = 0;  // most in one pass
  int64_t adjusted_now = 0, counted_now = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (i % static_cast<size_t>(pass_rows_) == 0) adjusted_now = counted_now = 0;
    const RowParams& row = rows[i];
    choices.errors[i] = error_of(row, vocab_);
    if (!choices.errors[i].empty()) continue;
    choices.num_logprobs[i] = std::min(row.num_logprobs, vocab_);
    pieces.take(static_cast<size_t>(row.num_bias) * 4);
    pieces.take(static_cast<size_t>(row.num_bias) * 4);
    if (row.allowed != nullptr) pieces.take(allowed_bytes(vocab_));
    if (counts_tokens(row)) pieces.take(static_cast<size_t>(row.history_length) * 4);
    adjusted = std::max(adjusted, adjusted_now += adjusts(row) ? 1 : 0);
    counted = std::max(counted, counted_now += counts_tokens(row) ? 1 : 0);
  }
  grow(adjusted_, adjusted * stride_ * int64_t{sizeof(float)}, stream);
  grow(counts_, counted * stride_ * int64_t{sizeof(uint32_t)}, stream);
  const size_t bytes = rows.size() * sizeof(SampledToken);
  if (choices.tokens.size() < bytes) choices.tokens = PinnedBuffer(bytes);
  return pieces.end();
}

void Sampler::write(std::span<const RowParams> rows, int32_t padding, const Choices& choices,
                    std::byte* host, std::byte* device) {
  histories_.clear();
  rows_ = reinterpret_cast<const SamplingRow*>(device);
  Pieces pieces;
  const size_t num_rows = rows.size() + static_cast<size_t>(padding);
  auto* out = reinterpret_cast<SamplingRow*>(host + pieces.take(num_rows * sizeof(SamplingRow)));
  std::uninitialized_fill_n(out + rows.size(), padding, SamplingRow());
  const auto put = [&]<typename T>(const T* values, size_t bytes) {
    const size_t at = pieces.take(bytes);
    std::memcpy(host + at, values, bytes);
    return reinterpret_cast<const T*>(device + at);
  };
  int64_t adjusted = 0, counted = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (i % static_cast<size_t>(pass_rows_) == 0) adjusted = counted = 0;
    const RowParams& from = rows[i];
    SamplingRow row;
    if (!choices.errors[i].empty()) {  // chooses something that nobody looks at
      std::memcpy(out + i, &row, sizeof row);
      continue;
    }
    row.temperature = from.temperature;
    row.top_p = from.top_p;
    row.min_p = from.min_p;
    row.uniform_bits = kernels::cuda::uniform_bits(from.seed, from.position);
    row.top_k = static_cast<int32_t>(std::min<int64_t>(from.top_k, vocab_));
    row.repetition_penalty = from.repetition_penalty;
    row.presence_penalty = from.presence_penalty;
    row.frequency_penalty = from.frequency_penalty;
    row.num_logprobs = choices.num_logprobs[i];
    row.forced_token = from.forced_token;
    if (from.num_bias > 0) {
      const auto bytes = static_cast<size_t>(from.num_bias) * 4;
      row.num_bias = static_cast<int32_t>(from.num_bias);
      row.bias_ids = put(from.bias_ids, bytes);
      row.bias_values = put(from.bias_values, bytes);
    }
    if (from.allowed != nullptr) row.allowed = put(from.allowed, allowed_bytes(vocab_));
    if (counts_tokens(from)) {
      const int64_t prompt = std::min(from.prompt_length, from.history_length);
      uint32_t* counts = counts_.as<uint32_t>() + counted++ * stride_;
      row.counts = counts;
      histories_.push_back({.row = static_cast<int32_t>(i),
                            .ids = put(from.history, static_cast<size_t>(from.history_length) * 4),
                            .counts = counts,
                            .prompt = static_cast<int32_t>(prompt),
                            .output = static_cast<int32_t>(from.history_length - prompt)});
    }
    if (adjusts(from)) row.adjusted = adjusted_.as<float>() + adjusted++ * stride_;
    std::memcpy(out + i, &row, sizeof row);
  }
}

void Sampler::take(int32_t* token_ids, const int32_t* sources, int32_t count,
                   const Stream& stream) const {
  kernels::cuda::TakeSampledParams p;
  p.token_ids = token_ids;
  p.sources = sources;
  p.sampled = sampled_.as<SampledToken>();
  p.num_tokens = count;
  kernels::cuda::take_sampled(p, stream.get());
}

void Sampler::count(int32_t first, int32_t count, const Stream& stream) const {
  for (const History& history : histories_) {
    if (history.row >= first && history.row < first + count) count_tokens(history, stream);
  }
}

void Sampler::count_tokens(const History& history, const Stream& stream) const {
  fill(history.counts, 0, static_cast<size_t>(vocab_) * sizeof(uint32_t), stream.get());
  kernels::cuda::CountTokensParams p;
  p.counts = history.counts;
  p.ids = history.ids;
  p.num_ids = history.prompt;
  p.prompt = true;
  if (p.num_ids > 0) kernels::cuda::count_tokens(p, stream.get());
  p.ids += history.prompt;
  p.num_ids = history.output;
  p.prompt = false;
  if (p.num_ids > 0) kernels::cuda::count_tokens(p, stream.get());
}

void Sampler::choose(const float* logits, int32_t first, int32_t count,
                     const Stream& stream) const {
  kernels::cuda::SamplingParams p;
  p.logits = logits;
  p.logits_stride = stride_;
  p.rows = rows_ + first;
  p.out = sampled_.as<SampledToken>() + first;
  p.workspace = workspace_.data();
  p.num_rows = count;
  p.vocab = vocab_;
  kernels::cuda::sample_tokens(p, stream.get());
}

void Sampler::fetch(int32_t first, int32_t count, const Choices& choices,
                    const Stream& stream) const {
  copy_to_host(choices.tokens.as<SampledToken>() + first, sampled_.as<SampledToken>() + first,
               static_cast<size_t>(count) * sizeof(SampledToken), stream.get());
}

}  // namespace sagellm::cuda
