// A row of a packed matrix back as floats, such as an embedding in a tied output head.
#pragma once

#include <cstdint>

#include "sagellm/quant/pack.h"

namespace sagellm::quant {

/// Writes the f32 values of `row` to out[k]: bitwise those of `dequantize_row` on the source row
/// (kF8: times their scales).
/// Throws InvalidArgument when there is no such row.
void unpack_row(const PackedMatrix& matrix, int64_t row, float* out);

}  // namespace sagellm::quant
