// Everything of a decoder layer that is neither a matrix product nor attention. Rows are dense,
// their starts are multiples of 16 bytes, and their lengths multiples of 8 elements; strides are in
// elements. Sums depend on the length of a row alone: a row has the same bits in any batch.
#pragma once

#include <cstdint>

#include "sagellm/kernels/cuda/attention_params.h"
#include "sagellm/kernels/cuda/float_type.h"

namespace sagellm::kernels::cuda {

inline constexpr int kMaxNormLength = 16384;

/// out[t] = table[token_ids[t]] * scale. The ids must be valid rows. Quantized tables: quantized.h.
struct EmbeddingParams {
  const void* table = nullptr;
  int64_t table_stride = 0;
  const int32_t* token_ids = nullptr;  // [num_tokens]
  float* out = nullptr;                // [num_tokens][out_stride]
  int64_t out_stride = 0;
  int32_t num_tokens = 0;
  int32_t n = 0;
  float scale = 1.f;
};
void embedding(FloatType table, const EmbeddingParams& params, void* stream);

/// residual[r] += delta[r], or += rms_norm(delta[r]) * post_norm; then out[r] =
/// rms_norm(residual[r]) * weight, where rms_norm(x) = x / sqrt(mean(x^2) + eps). Without delta the
/// residual stays; without out only the sum is formed. n is at most kMaxNormLength.
struct AddRmsNormParams {
  float* residual = nullptr;  // [rows][residual_stride]
  int64_t residual_stride = 0;
  const void* delta = nullptr;  // [rows][delta_stride], or null
  int64_t delta_stride = 0;
  const float* post_norm = nullptr;  // [n], or null
  const float* weight = nullptr;     // [n]
  const int32_t* rows = nullptr;     // [num_rows]: rows of residual and delta, out stays dense;
                                     // null: 0, 1, 2..
  void* out = nullptr;               // [num_rows][out_stride], or null
  int64_t out_stride = 0;
  int32_t num_rows = 0;
  int32_t n = 0;
  float eps = 0.f;
};
/// `out` is kBF16, kF16 or kF32; `delta` is the same or kF32.
void add_rms_norm(FloatType delta, FloatType out, const AddRmsNormParams& params, void* stream);

/// cos and sin of position * frequency, computed in double and multiplied by factor.
struct RopeTableParams {
  const int32_t* positions = nullptr;   // [num_tokens]
  const double* frequencies = nullptr;  // [half], radians per position
  float* cos = nullptr;                 // [num_tokens][half]
  float* sin = nullptr;
  int32_t num_tokens = 0;
  int32_t half = 0;
  float factor = 1.f;
};
void rope_table(const RopeTableParams& params, void* stream);

/// Finishes the fused projection of a layer: adds the bias, normalises the heads of q and k,
/// rotates pairs (i, i + half) of them, writes q for the attention kernel, K and V into the pages.
struct QkvParams {
  const void* qkv = nullptr;  // [num_tokens][stride]: q heads, then k heads, then v heads
  int64_t stride = 0;
  const float* bias = nullptr;    // [(num_heads + 2 * kv heads) * head_dim], or null
  const float* q_norm = nullptr;  // [head_dim], or null
  const float* k_norm = nullptr;
  float eps = 0.f;
  const float* cos = nullptr;  // [num_tokens][half]
  const float* sin = nullptr;
  int32_t half = 0;  // a multiple of 8, at most head_dim / 2; values from 2 * half on stay
  int32_t num_tokens = 0;
  int32_t num_heads = 0;
  FloatType q_type = FloatType::kBF16;  // kBF16 or kF16
  void* q = nullptr;                    // [num_tokens][q_stride]
  int64_t q_stride = 0;
  KvPages kv;  // head_dim a multiple of 16, at most 256
  /// [num_tokens]: block * page_size + place in the block; negative: K and V are not stored, for
  /// the rows that fill up a graph's batch.
  const int32_t* slots = nullptr;
};
void finish_qkv(FloatType input, const QkvParams& params, void* stream);

enum class GateFunction : int32_t { kSilu, kGeluTanh };

/// out[r, i] = f(x[r, i]) * x[r, n + i].
struct GatedParams {
  const void* x = nullptr;  // [num_rows][x_stride]: gate, then up
  int64_t x_stride = 0;
  void* out = nullptr;  // [num_rows][out_stride]
  int64_t out_stride = 0;
  int32_t num_rows = 0;
  int32_t n = 0;
  GateFunction function = GateFunction::kSilu;
};
/// `output` is `input`, or 16 bits where `input` is kF32.
void gated_activation(FloatType input, FloatType output, const GatedParams& params, void* stream);

/// x = cap * tanh(x / cap) on dense floats, count a multiple of 8.
struct SoftcapParams {
  float* x = nullptr;
  int64_t count = 0;
  float cap = 0.f;
};
void softcap(const SoftcapParams& params, void* stream);

/// Rounds to nearest even, or widens. Dense, count a multiple of 8.
struct ConvertParams {
  const void* from = nullptr;
  void* to = nullptr;
  int64_t count = 0;
};
/// Between kF32 and a 16-bit type.
void convert(FloatType from, FloatType to, const ConvertParams& params, void* stream);

}  // namespace sagellm::kernels::cuda
