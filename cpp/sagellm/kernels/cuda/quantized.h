// Weights in GGUF formats on the device: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K. No value
// changes; the bytes are rearranged so that a warp reads whole 16-byte pieces in the order in which
// tensor cores take them.
//
// A matrix [n, k] is a row of tiles of 16 rows, n rounded up to 16. A row of tiles is `steps` steps
// of 128 columns (k rounded up to 128, what is beyond it has scale 0), then `k / 256` superblocks
// for K formats. A unit is 32 columns, as in the formats. Lane 4 * r + c of a warp (r < 8, c < 4)
// reads of a step, for rows r and r + 8 (written i = 0, 1) and units u = 0 .. 3:
//
//   codes   4-bit formats: 2 pieces of 16 bytes, piece i, word u: byte j has the low bits of column
//           32 u + 4 c + j in its low and of column 32 u + 16 + 4 c + j in its high half.
//           Q8_0: 4 pieces, piece 2 i + h, word u: byte j is column 32 u + 16 h + 4 c + j.
//   bit 4   Q5: word i; byte j, bit 2 u + h: column 32 u + 16 h + 4 c + j.
//   bits 4, 5  Q6_K: word 2 i + u / 2; byte j, bits 4 (u % 2) + 2 h and the next: the same column.
//   scales  piece r, half-word 4 i + u: d as float16; K formats: two bytes, scale and minimum of
//   the
//           unit (Q4_K, Q5_K) or the scales of its halves (Q6_K)
//   minima  Q4_1, Q5_1: like scales, m as float16.
//
// Pieces of lanes follow each other. A superblock is [8 r][2 i] of d and dmin as float16.
#pragma once

#include <cstdint>

#include "sagellm/base/dtype.h"
#include "sagellm/kernels/cuda/float_type.h"

namespace sagellm::kernels::cuda {

inline constexpr int kTileRows = 16;
inline constexpr int kStepColumns = 128;
inline constexpr int kUnitColumns = 32;
inline constexpr int kQuantColumns = 8;  // rows of x in a call of quantized_linear

/// Sizes and offsets of a matrix; see above.
struct QuantLayout {
  int32_t high_offset = 0;   // in a step, after the codes
  int32_t scale_offset = 0;  // in a step
  int32_t step_bytes = 0;
  int32_t steps = 0;
  int64_t tile_row_bytes = 0;  // of 16 rows
  int32_t tile_rows = 0;       // ceil(n / 16)

  constexpr int64_t super_offset() const { return int64_t{steps} * step_bytes; }
  constexpr int64_t bytes() const { return tile_row_bytes * tile_rows; }
};

// The next three are defined in cuda/quantized_layout.cc, beside what loads weights.

/// Whether the kernels take this format.
bool is_device_format(Format format);
/// Throws Unsupported for other formats and InvalidArgument unless n > 0 and k is whole blocks.
QuantLayout quant_layout(Format format, int64_t n, int64_t k);
/// Rearranges 16 rows, of which the first `num_rows` exist, from rows as in a file (row_bytes
/// apart) to `out`, tile_row_bytes long. Calls for different tile rows may run at the same time.
void repack_tile_row(Format format, int64_t k, const uint8_t* rows, int64_t row_bytes,
                     int32_t num_rows, uint8_t* out);

/// A rearranged matrix on the device.
struct QuantMatrix {
  Format format = Format::kQ8_0;
  const uint8_t* data = nullptr;  // 16-byte aligned
  QuantLayout layout;
  int32_t n = 0;
  int32_t k = 0;
};

/// Activations as int8 per unit: x = d * code, d = max|x| / 127 over the unit, for up to 8 rows.
/// `data` has quantized_rows_bytes(k) bytes, 16-byte aligned.
constexpr int64_t quantized_rows_bytes(int64_t k) {
  return (k + kStepColumns - 1) / kStepColumns * (kStepColumns + kStepColumns / 4) * kQuantColumns;
}
struct QuantizeRowsParams {
  const void* x = nullptr;  // [m][x_stride]
  int64_t x_stride = 0;
  uint8_t* data = nullptr;
  int32_t m = 0;
  int32_t k = 0;
};
void quantize_rows(FloatType x, const QuantizeRowsParams& params, void* stream);

/// out[i, j] = sum over l of x[i, l] * weights[j, l], plus bias[j], for m <= 8. The sum over a unit
/// is exact in integers; units add in float in an order that depends on k alone.
struct QuantizedLinearParams {
  QuantMatrix weights;
  const uint8_t* x = nullptr;   // by quantize_rows
  const float* bias = nullptr;  // [n], or null
  void* out = nullptr;          // [m][out_stride]
  int64_t out_stride = 0;
  FloatType out_type = FloatType::kF32;
  int32_t m = 0;
};
void quantized_linear(const QuantizedLinearParams& params, void* stream);

/// Rows [first_row, first_row + num_rows), first_row a multiple of 16, and columns [first_column,
/// first_column + num_columns), both multiples of 32, as values for the tensor cores: those of the
/// format in float, rounded to nearest even.
struct DequantizeParams {
  QuantMatrix weights;
  void* out = nullptr;                    // [num_rows][out_stride]
  int64_t out_stride = 0;                 // a multiple of 8
  FloatType out_type = FloatType::kBF16;  // kBF16 or kF16
  int32_t first_row = 0;
  int32_t num_rows = 0;
  int32_t first_column = 0;
  int32_t num_columns = 0;
};
void dequantize(const DequantizeParams& params, void* stream);

/// out[t] = weights[token_ids[t]] * scale. The ids must be valid rows.
struct QuantizedEmbeddingParams {
  QuantMatrix weights;
  const int32_t* token_ids = nullptr;
  float* out = nullptr;  // [num_tokens][out_stride], a multiple of 4
  int64_t out_stride = 0;
  int32_t num_tokens = 0;
  float scale = 1.f;
};
void quantized_embedding(const QuantizedEmbeddingParams& params, void* stream);

/// out[i, j] = sum over l of x[i, l] * weights[j, l], plus bias[j], for m <= 8 and dense 16-bit
/// rows of whole 16-byte pieces: k is a multiple of 8. The order of additions depends on k alone.
struct SmallLinearParams {
  FloatType type = FloatType::kBF16;  // of x and weights: kBF16 or kF16
  const void* x = nullptr;            // [m][x_stride]
  int64_t x_stride = 0;
  const void* weights = nullptr;  // [n][weights_stride]
  int64_t weights_stride = 0;
  const float* bias = nullptr;  // [n], or null
  void* out = nullptr;          // [m][out_stride]
  int64_t out_stride = 0;
  FloatType out_type = FloatType::kF32;
  int32_t m = 0;
  int32_t n = 0;
  int32_t k = 0;
};
void small_linear(const SmallLinearParams& params, void* stream);

}  // namespace sagellm::kernels::cuda
