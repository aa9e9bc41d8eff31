// Choosing tokens on the device, by the rule of sample/sampler.h, without sorting.
//
// Three kernels. The first applies bias, penalties and mask, and keeps the largest value of every
// chunk of 128 logits; the second weighs the chunks of rows that draw; the third, one block per
// row, looks for thresholds by bisecting the bits of floats, reading only chunks whose largest
// value reaches them. Weights are whole multiples of 2^-44 of the heaviest, so that sums are exact
// and the result depends on no order. They differ from the CPU's doubles by less than 2^-44 each: a
// draw can differ where u * total lies that close to a token's border, about once in 10^8 draws.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sagellm::kernels::cuda {

inline constexpr int kMaxTopLogprobs = 20;
inline constexpr int kMaxSamplingVocab = 1 << 19;  // sums of weights stay below 2^63
inline constexpr int kSamplingChunk = 128;

/// How to choose one token; sample::RowParams with memory of the device.
struct SamplingRow {
  double temperature = 0.0;  // 0: greedy
  double top_p = 1.0;
  double min_p = 0.0;
  uint64_t uniform_bits = 0;  // uniform_bits(seed, position)
  const int32_t* bias_ids = nullptr;
  const float* bias_values = nullptr;
  const uint32_t* counts = nullptr;   // [vocab], by count_tokens; null: no penalties
  const uint32_t* allowed = nullptr;  // [ceil(vocab / 32)]; null: every id
  /// [vocab], 16-byte aligned: memory for the adjusted logits; needed with bias, counts or allowed.
  float* adjusted = nullptr;
  int32_t num_bias = 0;
  int32_t top_k = 0;  // 0: off
  float repetition_penalty = 1.f;
  float presence_penalty = 0.f;
  float frequency_penalty = 0.f;
  int32_t num_logprobs = -1;  // at most kMaxTopLogprobs
  int32_t forced_token = -1;
};

enum class SampleStatus : int32_t {
  kChosen,
  kNotFinite,          // logits are not finite
  kNoneAllowed,        // no token is allowed
  kAdjustedNotFinite,  // logits are not finite after bias and penalties
};

struct SampledToken {
  int32_t token_id = -1;
  SampleStatus status = SampleStatus::kChosen;
  double logprob = 0.0;  // with num_logprobs >= 0
  int32_t top_ids[kMaxTopLogprobs] = {};
  double top_logprobs[kMaxTopLogprobs] = {};
};

/// 53 random bits: u of the rule is uniform_bits * 2^-53.
constexpr uint64_t uniform_bits(uint64_t seed, uint64_t position) {
  uint64_t z = seed + 0x9E3779B97F4A7C15u * (position + 1);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return (z ^ (z >> 31)) >> 11;
}

struct SamplingParams {
  const float* logits = nullptr;      // [num_rows][logits_stride], 16-byte aligned
  int64_t logits_stride = 0;          // a multiple of 4
  const SamplingRow* rows = nullptr;  // [num_rows]
  SampledToken* out = nullptr;        // [num_rows]
  std::byte* workspace = nullptr;     // sampling_workspace_bytes, 16-byte aligned
  int32_t num_rows = 0;               // at most 65535
  int32_t vocab = 0;                  // at most kMaxSamplingVocab
};
constexpr int32_t sampling_chunks(int32_t vocab) {
  return (vocab + kSamplingChunk - 1) / kSamplingChunk;
}
/// Per row and chunk: the weight, the largest raw and adjusted logit, the sum of exponentials.
constexpr size_t sampling_workspace_bytes(int32_t num_rows, int32_t vocab) {
  return size_t{20} * static_cast<size_t>(num_rows) * static_cast<size_t>(sampling_chunks(vocab));
}

/// Chooses a token for every row. Rows must be valid (sample::validate).
void sample_tokens(const SamplingParams& params, void* stream);

/// What penalties know of a row: bit 0 of counts[id]: id is in the prompt; the rest: how often it
/// is in the output. Zero the array, count the prompt, then the output.
struct CountTokensParams {
  const int32_t* ids = nullptr;
  uint32_t* counts = nullptr;  // [vocab]
  int32_t num_ids = 0;
  bool prompt = false;
};
void count_tokens(const CountTokensParams& params, void* stream);

/// token_ids[i] = the token that row sources[i] has chosen; 0 where it chose none.
struct TakeSampledParams {
  int32_t* token_ids = nullptr;      // [num_tokens]
  const int32_t* sources = nullptr;  // [num_tokens]; negative: the token stands there already
  const SampledToken* sampled = nullptr;
  int32_t num_tokens = 0;
};
void take_sampled(const TakeSampledParams& params, void* stream);

}  // namespace sagellm::kernels::cuda
