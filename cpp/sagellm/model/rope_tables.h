// Cosines and sines of the positions of one step, a table for each rope of the model.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "sagellm/model/config.h"
#include "sagellm/tensor/buffer.h"

namespace sagellm::model {

class RopeTables {
 public:
  /// The values of one rope, [tokens, half] each.
  struct View {
    const float* cos;
    const float* sin;
    int64_t half;  // rotated values / 2
  };

  /// Memory for steps of up to `max_tokens`. `ropes` must outlive this.
  RopeTables(std::span<const Rope> ropes, int64_t max_tokens);

  /// Computes row `token` of every table. Calls for different tokens may run at the same time.
  void fill(int64_t token, int32_t position);

  View view(int32_t rope) const;
  size_t bytes() const { return cos_.size() + sin_.size(); }

 private:
  std::span<const Rope> ropes_;
  std::vector<int64_t> starts_;  // floats before each rope's table
  Buffer cos_, sin_;
};

}  // namespace sagellm::model
