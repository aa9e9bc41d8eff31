#include "sagellm/cuda/step_shape.h"

#include <algorithm>
#include <bit>

#include "sagellm/base/math.h"

namespace sagellm::cuda {

namespace {

int32_t padded_sequences(int32_t sequences) {
  const auto power = static_cast<int32_t>(std::bit_ceil(static_cast<uint32_t>(sequences)));
  const int32_t grain = sequences <= 64 ? 8 : sequences <= 128 ? 16 : 32;
  return sequences <= 8 ? power : static_cast<int32_t>(round_up(sequences, grain));
}

}  // namespace

StepShape decode_bucket(int32_t sequences, int32_t table_width, int32_t max_sequences,
                        int32_t max_width) {
  StepShape shape;
  shape.sequences = std::min(padded_sequences(sequences), max_sequences);
  shape.tokens = shape.logit_rows = shape.sequences;
  const auto width = static_cast<int32_t>(std::bit_ceil(static_cast<uint32_t>(table_width)));
  shape.table_width = std::min(width, max_width);
  return shape;
}

std::vector<int32_t> decode_bucket_sizes(int32_t max_sequences) {
  std::vector<int32_t> sizes;
  for (int32_t n = 1; n <= max_sequences; n = sizes.back() + 1) {
    sizes.push_back(std::min(padded_sequences(n), max_sequences));
  }
  return sizes;
}

StepLayout step_layout(const StepShape& shape, int32_t num_groups,
                       const std::vector<int64_t>& plan_words) {
  StepLayout at;
  const auto take = [&](int64_t words) {
    const size_t begin = at.bytes;
    at.bytes += static_cast<size_t>(round_up(words, 4)) * sizeof(int32_t);
    return begin;
  };
  at.token_ids = take(shape.tokens);
  at.token_sources = take(shape.tokens);
  at.positions = take(shape.tokens);
  at.slots = take(int64_t{num_groups} * shape.tokens);
  at.logit_rows = take(shape.logit_rows);
  at.block_tables = take(int64_t{num_groups} * shape.sequences * shape.table_width);
  for (const int64_t words : plan_words) at.plans.push_back(take(words));
  return at;
}

}  // namespace sagellm::cuda
