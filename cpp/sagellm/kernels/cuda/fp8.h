// Linear layers with FP8 (e4m3) weights, which stay one byte each on the device.
#pragma once

#include <cstdint>

#include "sagellm/kernels/cuda/float_type.h"

namespace sagellm::kernels::cuda {

inline constexpr int kFp8Group = 128;     // columns with one scale where a row has several
inline constexpr int kFp8Alignment = 16;  // k is a multiple

/// Rows of codes; weight [j, l] = code * scales[(groups > 1 ? l / 128 : 0) * n + j].
struct Fp8Matrix {
  const uint8_t* codes = nullptr;  // [n][k], 16-byte aligned
  const float* scales = nullptr;   // [groups][n]
  int32_t n = 0;
  int32_t k = 0;
  int32_t groups = 1;  // 1 or ceil(k / 128)
};

/// out[i, j] = sum over l of x[i, l] * weights[j, l], plus bias[j], for m <= 8. Codes become bf16
/// or f16 exactly; the sum over 128 columns is scaled and added in float, in an order that depends
/// on k alone.
struct Fp8SmallLinearParams {
  Fp8Matrix weights;
  FloatType type = FloatType::kBF16;  // of x: kBF16 or kF16
  const void* x = nullptr;            // [m][x_stride], rows of whole 16-byte pieces
  int64_t x_stride = 0;
  const float* bias = nullptr;  // [n], or null
  void* out = nullptr;          // [m][out_stride]
  int64_t out_stride = 0;
  FloatType out_type = FloatType::kF32;
  int32_t m = 0;
};
void fp8_small_linear(const Fp8SmallLinearParams& params, void* stream);

/// Rows as FP8: x = code * scale, scale = max|x| / 448 over the row, codes rounded to nearest even.
/// A row with a value that is not finite gets scale NaN.
struct Fp8QuantizeParams {
  const void* x = nullptr;  // [m][x_stride], rows of whole 16-byte pieces
  int64_t x_stride = 0;
  uint8_t* codes = nullptr;  // [m][k]
  float* scales = nullptr;   // [m]
  int32_t m = 0;
  int32_t k = 0;  // a multiple of 16
};
void fp8_quantize(FloatType x, const Fp8QuantizeParams& params, void* stream);

/// out[i, j] = x_scales[i] * sum over l of x[i, l] * weights[j, l] on the tensor cores, for compute
/// capability 8.9 and newer. Every sum runs over l in ascending steps of 32 in one chain; with
/// groups it starts anew in each, and the scaled groups are added in ascending order. So a row
/// alone gives the same bits as in any batch.
struct Fp8GemmParams {
  Fp8Matrix weights;
  const uint8_t* x = nullptr;       // [m][k], 16-byte aligned
  const float* x_scales = nullptr;  // [m]
  void* out = nullptr;              // [m][out_stride]
  int64_t out_stride = 0;
  int32_t m = 0;
  int32_t n = 0;  // of weights
};
void fp8_gemm(FloatType output, const Fp8GemmParams& params, void* stream);

/// Rows [first_row, first_row + num_rows) as values: code * scale in float, rounded to nearest
/// even.
struct Fp8DequantizeParams {
  Fp8Matrix weights;
  void* out = nullptr;                    // [num_rows][k], 16-byte aligned
  FloatType out_type = FloatType::kBF16;  // kBF16 or kF16
  int32_t first_row = 0;
  int32_t num_rows = 0;
};
void fp8_dequantize(const Fp8DequantizeParams& params, void* stream);

}  // namespace sagellm::kernels::cuda
