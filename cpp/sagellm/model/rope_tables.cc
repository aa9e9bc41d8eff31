#include "sagellm/model/rope_tables.h"

#include <cmath>

namespace sagellm::model {

RopeTables::RopeTables(std::span<const Rope> ropes, int64_t max_tokens) : ropes_(ropes) {
  int64_t floats = 0;
  for (const Rope& rope : ropes) {
    starts_.push_back(floats);
    floats += static_cast<int64_t>(rope.inverse_frequencies.size()) * max_tokens;
  }
  cos_ = Buffer(static_cast<size_t>(floats) * sizeof(float));
  sin_ = Buffer(static_cast<size_t>(floats) * sizeof(float));
}

void RopeTables::fill(int64_t token, int32_t position) {
  for (size_t i = 0; i < ropes_.size(); ++i) {
    const Rope& rope = ropes_[i];
    const auto half = static_cast<int64_t>(rope.inverse_frequencies.size());
    const int64_t row = starts_[i] + token * half;
    float* cos = reinterpret_cast<float*>(cos_.data()) + row;
    float* sin = reinterpret_cast<float*>(sin_.data()) + row;
    for (int64_t j = 0; j < half; ++j) {
      const double angle = position * rope.inverse_frequencies[static_cast<size_t>(j)];
      cos[j] = static_cast<float>(std::cos(angle) * static_cast<double>(rope.attention_factor));
      sin[j] = static_cast<float>(std::sin(angle) * static_cast<double>(rope.attention_factor));
    }
  }
}

RopeTables::View RopeTables::view(int32_t rope) const {
  const auto index = static_cast<size_t>(rope);
  const int64_t start = starts_[index];
  return {reinterpret_cast<const float*>(cos_.data()) + start,
          reinterpret_cast<const float*>(sin_.data()) + start,
          static_cast<int64_t>(ropes_[index].inverse_frequencies.size())};
}

}  // namespace sagellm::model
