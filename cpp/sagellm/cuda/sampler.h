// Chooses tokens on the device: packs the rules of a step for kernels/cuda/sampling.h, and unpacks
// what they chose.
//
//   measure(rows), write(rows, host, device)   with the other metadata of the step
//   take                                       tokens that the step before has chosen
//   count, choose, fetch                       for the rows in turn, `max_rows` at a time
//   Choices::results()                         when the stream has done that
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "sagellm/cuda/memory.h"
#include "sagellm/cuda/stream.h"
#include "sagellm/kernels/cuda/sampling.h"
#include "sagellm/sample/sampler.h"

namespace sagellm::cuda {

/// What one step keeps of its rows until it is done.
struct Choices {
  std::vector<std::string> errors;  // per row, empty: none
  std::vector<int32_t> num_logprobs;
  PinnedBuffer tokens;  // SampledToken, of all rows

  /// Of a step that is done.
  std::vector<sample::Result> results() const;
};

class Sampler {
 public:
  /// For steps of up to `max_rows` rows of `vocab` logits, `pass_rows` of them at a time. Throws
  /// Unsupported when the vocabulary is too large.
  Sampler(int64_t vocab, int64_t logits_stride, int32_t max_rows, int32_t pass_rows);

  /// Bytes of the rows in the upload, and of `padding` rows behind them whose choice nobody looks
  /// at. A row that is invalid fails alone, in its result. Waits for `stream` when memory must
  /// grow.
  size_t measure(std::span<const sample::RowParams> rows, int32_t padding, Choices& choices,
                 const Stream& stream);
  /// Writes the measured rows to `host` [measured bytes], which is copied to `device` before
  /// `count`.
  void write(std::span<const sample::RowParams> rows, int32_t padding, const Choices& choices,
             std::byte* host, std::byte* device);
  /// Queues what puts the tokens that rows `sources` of the step before have chosen into
  /// `token_ids`, both on the device; a negative source leaves a token as it is.
  void take(int32_t* token_ids, const int32_t* sources, int32_t count, const Stream& stream) const;
  /// Queues what rows [first, first + count) need before they can be chosen.
  void count(int32_t first, int32_t count, const Stream& stream) const;
  /// Queues the choice of these rows, at most `pass_rows`, whose logits stand at `logits`. What it
  /// launches depends on the arguments and on where `write` wrote, not on the rules.
  void choose(const float* logits, int32_t first, int32_t count, const Stream& stream) const;
  /// Queues the download of what was chosen.
  void fetch(int32_t first, int32_t count, const Choices& choices, const Stream& stream) const;

  size_t bytes() const;

 private:
  /// What `run` must count before a row with penalties is chosen.
  struct History {
    int32_t row = 0;
    const int32_t* ids = nullptr;  // on the device
    uint32_t* counts = nullptr;
    int32_t prompt = 0;
    int32_t output = 0;
  };

  void count_tokens(const History& history, const Stream& stream) const;

  int32_t vocab_;
  int64_t stride_;
  int32_t pass_rows_;
  std::vector<History> histories_;                    // of the present step, ascending rows
  const kernels::cuda::SamplingRow* rows_ = nullptr;  // the same, on the device
  DeviceBuffer adjusted_;                             // [rows of a pass that need it][stride]
  DeviceBuffer counts_;                               // [rows of a pass that need it][vocab]
  DeviceBuffer workspace_;
  DeviceBuffer sampled_;  // SampledToken [max_rows]
};

}  // namespace sagellm::cuda
