// Whole-tensor parameters of the operations in ops/: one struct per operation, the same for every
// device. Float rows are dense; consecutive rows are `..._stride` elements apart.
#pragma once

#include <cstdint>

#include "sagellm/kernels/params.h"

namespace sagellm::kernels {

/// How quantized matmuls represent activations: one int8 plane per 32 values, or two (15 bits).
/// Formats whose kernels take floats ignore it.
enum class ActPrecision : uint8_t { kA8, kA15 };

/// out[t, i] = sum_j weights[i, j] * x[t, j]; weights in the R16 layout. `out` and `x` are
/// disjoint.
struct LinearParams {
  PackedFormat format = PackedFormat::kF32;
  const void* weights = nullptr;  // ceil(n / 16) row blocks, 64-byte aligned
  int64_t n = 0;
  int64_t k = 0;
  ActPrecision precision = ActPrecision::kA8;
  int64_t num_tokens = 0;
  const float* x = nullptr;  // [num_tokens][k]
  int64_t x_stride = 0;
  float* out = nullptr;  // [num_tokens][n]
  int64_t out_stride = 0;
};

/// out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight; `out` may be `x`.
struct RmsNormParams {
  int64_t num_rows = 0;
  int64_t n = 0;
  float eps = 0.f;
  const float* x = nullptr;
  int64_t x_stride = 0;
  const float* weight = nullptr;  // [n]
  float* out = nullptr;
  int64_t out_stride = 0;
};

/// NeoX rotation in place: of every head, values (i, i + half) for i < half; the rest stays.
struct RopeParams {
  int64_t num_tokens = 0;
  int64_t num_heads = 0;
  int64_t head_dim = 0;
  int64_t half = 0;
  float* x = nullptr;  // [num_tokens][num_heads * head_dim]
  int64_t x_stride = 0;
  const float* cos = nullptr;  // [num_tokens][half]
  int64_t cos_stride = 0;
  const float* sin = nullptr;
  int64_t sin_stride = 0;
};

enum class GateActivation : uint8_t { kSilu, kGeluTanh };

/// out[r] = activation(gate[r]) * up[r]; `out` may be `gate` or `up`.
struct GatedActivationParams {
  GateActivation activation = GateActivation::kSilu;
  int64_t num_rows = 0;
  int64_t n = 0;
  const float* gate = nullptr;
  int64_t gate_stride = 0;
  const float* up = nullptr;
  int64_t up_stride = 0;
  float* out = nullptr;
  int64_t out_stride = 0;
};

/// Sequence s owns the rows query_starts[s] .. query_starts[s + 1] of a step, at consecutive
/// positions from positions[query_starts[s]]. These arrays are host memory on every device.
struct RaggedParams {
  int64_t num_sequences = 0;
  const int32_t* query_starts = nullptr;  // [num_sequences + 1]
  const int32_t* positions = nullptr;     // [num_tokens]
  const int32_t* block_tables = nullptr;  // [num_sequences][block_tables_stride]
  int64_t block_tables_stride = 0;
};

/// Writes the K and V rows of a step into the pages.
struct KvWriteBatchParams {
  KvView kv;
  int64_t num_kv_heads = 0;
  RaggedParams batch;
  const float* k = nullptr;  // [num_tokens][num_kv_heads * head_dim]
  int64_t k_stride = 0;
  const float* v = nullptr;
  int64_t v_stride = 0;
};

/// Causal attention of the rows of a step over the pages; window, scale and softcap as in
/// AttentionParams. Query head h reads kv head h / (num_heads / num_kv_heads).
struct PagedAttentionParams {
  KvView kv;
  int64_t num_kv_heads = 0;
  int64_t num_heads = 0;
  RaggedParams batch;
  const float* q = nullptr;  // [num_tokens][num_heads * head_dim], after RoPE, unscaled
  int64_t q_stride = 0;
  float* out = nullptr;  // like q
  int64_t out_stride = 0;
  int32_t window = 0;
  float scale = 1.f;
  float softcap = 0.f;
};

}  // namespace sagellm::kernels
