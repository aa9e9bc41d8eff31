// The sizes that the arrays of a step have on the device, and where they lie in its one upload.
// Host code: nothing here needs a GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sagellm::cuda {

/// Sizes of a step as kernels see them. Steps of equal shape use the same addresses and the same
/// launches, which is what lets a recorded step be replayed.
struct StepShape {
  int32_t tokens = 0;
  int32_t sequences = 0;
  int32_t logit_rows = 0;
  int32_t table_width = 0;  // blocks in a row of a block table
  uint64_t wide_kinds = 0;  // bit i: attention of the i-th kind of layer needs its wide kernel
  bool samples = false;     // tokens are chosen
  bool operator==(const StepShape&) const = default;
};

/// The shape that a decode step (one token and one logit row for each sequence) is padded to: the
/// next power of two up to 8 sequences, multiples of 8 up to 64, of 16 up to 128, of 32 beyond;
/// block tables a power of two wide. Sizes never exceed `max_sequences` and `max_width`, which must
/// be at least those given.
StepShape decode_bucket(int32_t sequences, int32_t table_width, int32_t max_sequences,
                        int32_t max_width);

/// Every number of sequences that decode_bucket pads to, ascending.
std::vector<int32_t> decode_bucket_sizes(int32_t max_sequences);

/// Byte offsets of the arrays of a step in its upload, each a multiple of 16.
struct StepLayout {
  size_t token_ids = 0;       // int32 [tokens]
  size_t token_sources = 0;   // int32 [tokens]: see Decoder::launch
  size_t positions = 0;       // int32 [tokens]
  size_t slots = 0;           // int32 [groups][tokens]: where K and V go, see QkvParams
  size_t logit_rows = 0;      // int32 [logit_rows]
  size_t block_tables = 0;    // int32 [groups][sequences][table_width]
  std::vector<size_t> plans;  // int32 [words]: one attention plan per kind of layer
  size_t bytes = 0;
};
/// `plan_words`: of each plan.
StepLayout step_layout(const StepShape& shape, int32_t num_groups,
                       const std::vector<int64_t>& plan_words);

}  // namespace sagellm::cuda
