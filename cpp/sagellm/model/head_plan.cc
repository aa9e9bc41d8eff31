#include "sagellm/model/head_plan.h"

#include <algorithm>

#include "sagellm/base/math.h"
#include "sagellm/kernels/params.h"

namespace sagellm::model {

void HeadPlan::build(int64_t vocab_size, std::span<const sample::RowParams> sampling,
                     bool all_logits) {
  static_assert(32 % kernels::kRowBlock == 0);
  constexpr int64_t kBlocksPerWord = 32 / kernels::kRowBlock;
  constexpr uint32_t kBlockBits = (uint32_t{1} << kernels::kRowBlock) - 1;
  const bool restricted =
      !all_logits && !sampling.empty() &&
      std::all_of(sampling.begin(), sampling.end(), [](const sample::RowParams& row) {
        return row.allowed != nullptr && row.num_logprobs < 0;
      });
  const int64_t words = ceil_div(vocab_size, 32);
  union_.assign(static_cast<size_t>(words), restricted ? 0u : ~0u);
  if (restricted) {
    for (const sample::RowParams& row : sampling) {
      std::transform(union_.begin(), union_.end(), row.allowed, union_.begin(),
                     [](uint32_t a, uint32_t b) { return a | b; });
    }
  }
  blocks_.clear();
  for (int64_t block = 0; block < ceil_div(vocab_size, kernels::kRowBlock); ++block) {
    const uint32_t word = union_[static_cast<size_t>(block / kBlocksPerWord)];
    if ((word >> (block % kBlocksPerWord * kernels::kRowBlock) & kBlockBits) != 0) {
      blocks_.push_back(static_cast<int32_t>(block));
    }
  }
}

}  // namespace sagellm::model
