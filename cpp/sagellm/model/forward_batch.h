// The tokens of one engine step, as spans over the caller's arrays.
#pragma once

#include <cstdint>
#include <span>

#include "sagellm/model/config.h"

namespace sagellm::model {

/// S sequences, T tokens, R rows whose logits are wanted. See `ForwardBatch` in the Python backend
/// interface.
struct ForwardBatch {
  std::span<const int32_t> token_ids;     // [T]
  std::span<const int32_t> positions;     // [T], consecutive within a sequence
  std::span<const int32_t> query_starts;  // [S + 1]
  std::span<const int32_t> block_tables;  // [G, S, max_blocks], 0-padded
  std::span<const int32_t> block_copies;  // [C, 2] (source, destination)
  std::span<const int32_t> logit_rows;    // [R], ascending
  int32_t num_groups = 0;
  int32_t max_blocks = 0;

  int32_t num_tokens() const { return static_cast<int32_t>(token_ids.size()); }
  int32_t num_sequences() const { return static_cast<int32_t>(query_starts.size()) - 1; }
  int32_t num_logit_rows() const { return static_cast<int32_t>(logit_rows.size()); }

  const int32_t* block_table(int32_t group, int32_t sequence) const {
    return block_tables.data() +
           (static_cast<int64_t>(group) * num_sequences() + sequence) * max_blocks;
  }
};

/// What a device holds for steps.
struct BatchLimits {
  int32_t max_batch_tokens = 0;
  int64_t num_blocks = 0;  // usable KV blocks
  int32_t block_size = 0;
};

/// Throws InvalidArgument naming what is wrong with a step; afterwards every index in it is valid.
void validate(const ForwardBatch& batch, const ModelConfig& config, const BatchLimits& limits);

}  // namespace sagellm::model
