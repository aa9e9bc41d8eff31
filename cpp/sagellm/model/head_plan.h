// Which row blocks of the output head a step must compute: all of them, or, when every row chooses
// from an allowed set and nobody asks for logits or log-probabilities, those that hold an allowed
// token of some row.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "sagellm/sample/sampler.h"

namespace sagellm::model {

class HeadPlan {
 public:
  /// `all_logits`: the caller wants every logit.
  void build(int64_t vocab_size, std::span<const sample::RowParams> sampling, bool all_logits);

  int64_t num_blocks() const { return static_cast<int64_t>(blocks_.size()); }

  /// Calls body(first block, end block) for each run of adjacent row blocks among the needed ones
  /// number begin .. end - 1.
  template <typename Body>
  void for_runs(int64_t begin, int64_t end, const Body& body) const {
    while (begin < end) {
      const int64_t first = block(begin);
      int64_t count = 1;
      while (begin + count < end && block(begin + count) == first + count) ++count;
      body(first, first + count);
      begin += count;
    }
  }

 private:
  int64_t block(int64_t i) const { return blocks_[static_cast<size_t>(i)]; }

  std::vector<int32_t> blocks_;  // ascending
  std::vector<uint32_t> union_;  // scratch of build: tokens that some row allows
};

}  // namespace sagellm::model
