// Chooses one token from a row of logits. The rule, in order: bias, repetition, presence and
// frequency penalties, allowed set, temperature (0: greedy), top-k, top-p, min-p, inverse-CDF draw
// with a counter-based random number. Python face and full text:
// sagellm.backends.interface.SamplingRow; NumPy twin: sagellm.backends.numpy_sampler.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sagellm/kernels/params.h"

namespace sagellm::sample {

/// How to choose one token. The pointers are borrowed for the call.
struct RowParams {
  double temperature = 0.0;  // 0: greedy
  int64_t top_k = 0;         // 0: off
  double top_p = 1.0;        // in (0, 1]; 1: off
  double min_p = 0.0;        // in [0, 1]; 0: off
  float repetition_penalty = 1.f;
  float presence_penalty = 0.f;
  float frequency_penalty = 0.f;
  const int32_t* bias_ids = nullptr;
  const float* bias_values = nullptr;
  int64_t num_bias = 0;
  const int32_t* history = nullptr;  // prompt, then output
  int64_t history_length = 0;
  int64_t prompt_length = 0;
  const uint32_t* allowed = nullptr;  // bit id % 32 of word id / 32; null: every id
  uint64_t seed = 0;
  uint64_t position = 0;      // index of the token being drawn
  int32_t num_logprobs = -1;  // -1: none; 0: the chosen token's; n: also the n most likely
  int32_t forced_token = -1;  // >= 0: chosen whatever the rest says, to learn its log-probability
};

/// The chosen token, or in `error` why there is none (then the other fields are empty).
struct Result {
  int32_t token_id = -1;
  double logprob = 0.0;  // of the raw logits, natural logarithm; valid when num_logprobs >= 0
  std::vector<int32_t> top_ids;
  std::vector<double> top_logprobs;
  std::string error;
};

struct Candidate {
  double weight;  // exp((logit - largest) / temperature)
  float logit;
  int32_t id;
};

/// Working memory of one thread; grows to the vocabulary and is then reused without allocation.
struct Scratch {
  std::vector<float> logits;
  std::vector<uint8_t> seen;    // all zero between calls
  std::vector<int32_t> counts;  // all zero between calls
  std::vector<Candidate> candidates;
  std::vector<Candidate> selection;
  std::vector<double> weights;      // of every token with top-p, else of one block of tokens
  std::vector<double> block_sums;   // of the weights
  std::vector<double> bucket_sums;  // of the weights, by logit
};

/// Throws InvalidArgument, naming the parameter, unless `row` can be applied to `vocab` logits.
void validate(const RowParams& row, int64_t vocab);

/// Samples from logits[0 .. vocab). Validates `row`. Logits that are not finite give a Result with
/// an error. Deterministic: depends on the arguments and the instruction set of `table` alone.
Result sample_row(const float* logits, int64_t vocab, const RowParams& row,
                  const kernels::KernelTable& table, Scratch& scratch);

}  // namespace sagellm::sample
