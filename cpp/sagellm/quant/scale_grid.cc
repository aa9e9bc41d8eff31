#include "sagellm/quant/scale_grid.h"

#include <algorithm>
#include <cmath>

#include "sagellm/base/error.h"
#include "sagellm/base/math.h"
#include "sagellm/quant/codec.h"

namespace sagellm::quant {

ScaleGrid::ScaleGrid(const std::string& name, Format format, const std::vector<int64_t>& shape,
                     const uint8_t* data, int64_t n, int64_t k) {
  using Shape = std::vector<int64_t>;
  const Shape block_shape{ceil_div(n, kScaleBlock), ceil_div(k, kScaleBlock)};
  if (shape == Shape{} || shape == Shape{1} || shape == Shape{1, 1}) {
    rows_ = n;
  } else if (shape == Shape{n} || shape == Shape{n, 1}) {
    rows_ = 1;
  } else if (shape == block_shape) {
    rows_ = kScaleBlock;
    columns_ = block_shape[1];
    blocks_ = columns_ > 1;
  } else {
    fail<CorruptFile>("tensor '", name, "' does not fit a matrix of ", n, " x ", k,
                      "; expected one scale, one for each row, or one for each block of 128 x 128");
  }
  require<CorruptFile>(format == Format::kF32 || format == Format::kF16 || format == Format::kBF16,
                       "tensor '", name, "' holds scales as ", format_info(format).name,
                       "; expected F32, F16 or BF16");
  int64_t count = 1;
  for (const int64_t extent : shape) count *= extent;
  values_.resize(static_cast<size_t>(count));
  dequantize_row(format, data, values_.data(), count);
  for (const float value : values_) {
    require<CorruptFile>(std::isfinite(value), "tensor '", name,
                         "' has a scale that is not finite; download or convert the model again");
  }
}

bool has_nan_e4m3(const uint8_t* codes, int64_t n) {
  unsigned found = 0;
  for (int64_t i = 0; i < n; ++i) found |= static_cast<unsigned>((codes[i] & 0x7f) == 0x7f);
  return found != 0;
}

}  // namespace sagellm::quant
