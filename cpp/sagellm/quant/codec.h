// Scalar conversion between stored formats and f32: the definition that faster code is tested
// against.
#pragma once

#include <cstdint>

#include "sagellm/base/dtype.h"

namespace sagellm::quant {

/// Converts `n` stored elements (a whole number of blocks, any alignment) to f32, with GGUF
/// semantics: each product and sum rounded to f32 in the order that `formats.h` writes them.
/// F8_E4M3 gives the codes' values; the scales are tensors of their own (scale_grid.h). Throws
/// InvalidArgument when `n` is not a multiple of the block.
void dequantize_row(Format format, const void* src, float* dst, int64_t n);

/// Converts `n` f32 values to F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0, rounding to nearest
/// against the block's largest magnitude (_0) or its range (_1). NaN becomes the lowest code of a
/// quantized format. Throws Unsupported for other formats and InvalidArgument when `n` is not a
/// multiple of the block.
void quantize_row(Format format, const float* src, void* dst, int64_t n);

}  // namespace sagellm::quant
