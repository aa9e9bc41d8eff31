// Chooses tokens on the device: packs the rules of a step for kernels/cuda/sampling.h, and unpacks
// what they chose.
//
//   measure(rows), write(rows, host, device)   with the other metadata of the step
//   count, choose, fetch                       for the rows in turn, `max_rows` at a time
//   finish(results)                            when the stream has done that
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

class Sampler {
 public:
  /// For rows of `vocab` logits. Throws Unsupported when the vocabulary is too large.
  Sampler(int64_t vocab, int64_t logits_stride, int32_t max_rows);

  /// Bytes of the rows in the upload, and of `padding` rows behind them whose choice nobody looks
  /// at. A row that is invalid fails alone, in its result. Waits for `stream` when memory must
  /// grow.
  size_t measure(std::span<const sample::RowParams> rows, int32_t padding, const Stream& stream);
  /// Writes the measured rows to `host` [measured bytes], which is copied to `device` before
  /// `count`.
  void write(std::span<const sample::RowParams> rows, int32_t padding, std::byte* host,
             std::byte* device);
  /// Queues what rows [first, first + count) need before they can be chosen.
  void count(int32_t first, int32_t count, const Stream& stream) const;
  /// Queues the choice of these rows, whose logits stand at `logits`. What it launches depends on
  /// the arguments and on where `write` wrote, not on the rules.
  void choose(const float* logits, int32_t first, int32_t count, const Stream& stream) const;
  /// Queues the download of what was chosen, before the next choice.
  void fetch(int32_t first, int32_t count, const Stream& stream) const;
  void finish(std::span<sample::Result> results) const;

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
  int32_t max_rows_;
  std::vector<std::string> errors_;                   // per row, empty: none
  std::vector<History> histories_;                    // ascending rows
  const kernels::cuda::SamplingRow* rows_ = nullptr;  // on the device
  std::vector<int32_t> num_logprobs_;
  DeviceBuffer adjusted_;  // [rows of a pass that need it][stride]
  DeviceBuffer counts_;    // [rows of a pass that need it][vocab]
  DeviceBuffer workspace_;
  DeviceBuffer sampled_;  // of one pass
  PinnedBuffer results_;  // of all rows
};

}  // namespace sagellm::cuda
