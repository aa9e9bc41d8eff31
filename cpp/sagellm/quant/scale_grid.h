// Scales of an FP8 matrix: a weight is its code times the scale of its place.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sagellm/base/dtype.h"

namespace sagellm::quant {

/// Rows and columns of a block with one scale, where scales belong to blocks.
inline constexpr int64_t kScaleBlock = 128;

/// The scales of a matrix [n, k] as checkpoints store them: one number, one for each row ([n] or
/// [n, 1]), or one for each block of 128 x 128 ([ceil(n / 128), ceil(k / 128)]).
class ScaleGrid {
 public:
  /// Reads F32, F16 or BF16 scales; `name` is for messages. Throws CorruptFile when they have
  /// another shape or are not finite.
  ScaleGrid(const std::string& name, Format format, const std::vector<int64_t>& shape,
            const uint8_t* data, int64_t n, int64_t k);

  float at(int64_t row, int64_t column) const {
    return values_[static_cast<size_t>(row / rows_ * columns_ +
                                       (blocks_ ? column / kScaleBlock : 0))];
  }
  /// Whether a row has several scales.
  bool has_blocks() const { return blocks_; }

 private:
  std::vector<float> values_;
  int64_t rows_ = 1;     // of a scale
  int64_t columns_ = 1;  // scales of a row
  bool blocks_ = false;
};

/// Whether one of `n` codes is NaN.
bool has_nan_e4m3(const uint8_t* codes, int64_t n);

}  // namespace sagellm::quant
