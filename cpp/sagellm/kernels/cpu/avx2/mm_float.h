// f32, f16, bf16 and fp8 weights x f32 activations with AVX2: one fused multiply-add chain per
// output, ascending k (fp8: per group of 128 k, which gets its scale at the end).
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "sagellm/kernels/params.h"

#define SAGELLM_INLINE inline __attribute__((always_inline))

namespace sagellm::kernels {
namespace {

/// Columns of one step: bf16 rows are interleaved in pairs of k.
template <PackedFormat kFormat>
constexpr int kStep = kFormat == PackedFormat::kBF16 ? 2 : 1;

template <PackedFormat kFormat>
constexpr int kStepBytes = kFormat == PackedFormat::kF16 ? 32 : 64;

/// Of `k` columns: packed_row_block_bytes, which the linker would share with other files.
template <PackedFormat kFormat>
SAGELLM_INLINE int64_t row_block_bytes(int64_t k) {
  if constexpr (kFormat == PackedFormat::kF8) {
    return (k + kF8Group - 1) / kF8Group * 64 + k * kRowBlock;
  }
  return (k + kStep<kFormat> - 1) / kStep<kFormat> * kStepBytes<kFormat>;
}

/// 8 rows of column `i` of the step at `line`.
template <PackedFormat kFormat>
SAGELLM_INLINE __m256 load_weights(const uint8_t* line, int half, int i) {
  if constexpr (kFormat == PackedFormat::kF32) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(line) + 8 * half);
  } else if constexpr (kFormat == PackedFormat::kF16) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(line) + half));
  } else if constexpr (kFormat == PackedFormat::kF8) {
    // As halves, whose exponent bias is larger by 8: the values are 256 times too small.
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(line + 8 * half));
    const __m128i high = _mm_unpacklo_epi8(_mm_setzero_si128(), codes);
    return _mm256_cvtph_ps(_mm_andnot_si128(_mm_set1_epi16(0x4000), _mm_srai_epi16(high, 1)));
  } else {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line) + half);
    const __m256i odd =
        _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u)));
    return _mm256_castsi256_ps(i == 0 ? _mm256_slli_epi32(pairs, 16) : odd);
  }
}

/// Adds the first kColumns columns of a step to kBlocks x kTokens accumulators; x is token 0 at the
/// step.
template <PackedFormat kFormat, int kColumns, int kBlocks, int kTokens>
SAGELLM_INLINE void add_step(const uint8_t* line, int64_t stride, const float* x, int64_t x_stride,
                             __m256 (&acc)[kBlocks][kTokens][2]) {
#pragma GCC unroll 8
  for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 2
    for (int i = 0; i < kColumns; ++i) {
      const __m256 low = load_weights<kFormat>(line + b * stride, 0, i);
      const __m256 high = load_weights<kFormat>(line + b * stride, 1, i);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        const __m256 value = _mm256_set1_ps(x[t * x_stride + i]);
        acc[b][t][0] = _mm256_fmadd_ps(low, value, acc[b][t][0]);
        acc[b][t][1] = _mm256_fmadd_ps(high, value, acc[b][t][1]);
      }
    }
  }
}

template <int kBlocks, int kTokens>
SAGELLM_INLINE void store_tile(const __m256 (&acc)[kBlocks][kTokens][2], int64_t stride,
                               float* out) {
#pragma GCC unroll 8
  for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      float* row = out + t * stride + b * kRowBlock;
      _mm256_storeu_ps(row, acc[b][t][0]);
      _mm256_storeu_ps(row + 8, acc[b][t][1]);
    }
  }
}

/// kF8: sums of a group of columns, then its scales.
template <int kBlocks, int kTokens>
void tile_f8(const MatmulParams& p, const uint8_t* w, int64_t stride, int64_t token, float* out) {
  __m256 acc[kBlocks][kTokens][2] = {};
  const float* x = p.x.f32 + token * p.k;
  for (int64_t begin = 0; begin < p.k; begin += kF8Group) {
    const int64_t columns = p.k - begin < kF8Group ? p.k - begin : kF8Group;
    const uint8_t* codes = w + 64;
    __m256 sum[kBlocks][kTokens][2];
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) sum[b][t][0] = sum[b][t][1] = _mm256_setzero_ps();
    }
    for (int64_t i = 0; i < columns; ++i) {
      add_step<PackedFormat::kF8, 1>(codes + i * 16, stride, x + begin + i, p.k, sum);
    }
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const float* from = reinterpret_cast<const float*>(w + b * stride) + 8 * half;
        const __m256 scale = _mm256_mul_ps(_mm256_loadu_ps(from), _mm256_set1_ps(256.f));
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
          acc[b][t][half] = _mm256_fmadd_ps(sum[b][t][half], scale, acc[b][t][half]);
        }
      }
    }
    w = codes + columns * 16;
  }
  store_tile(acc, p.out_stride, out);
}

/// kBlocks row blocks x kTokens tokens.
template <PackedFormat kFormat, int kBlocks, int kTokens>
void tile_float(const MatmulParams& p, const uint8_t* w, int64_t stride, int64_t token,
                float* out) {
  if constexpr (kFormat == PackedFormat::kF8)
    return tile_f8<kBlocks, kTokens>(p, w, stride, token, out);
  constexpr int step = kStep<kFormat>;
  __m256 acc[kBlocks][kTokens][2];
#pragma GCC unroll 8
  for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) acc[b][t][0] = acc[b][t][1] = _mm256_setzero_ps();
  }
  const float* x = p.x.f32 + token * p.k;
  const int64_t steps = p.k / step;
  for (int64_t i = 0; i < steps; ++i) {
    add_step<kFormat, step>(w + i * kStepBytes<kFormat>, stride, x + i * step, p.k, acc);
  }
  if constexpr (step == 2) {
    if (p.k % 2 != 0)
      add_step<kFormat, 1>(w + steps * kStepBytes<kFormat>, stride, x + steps * 2, p.k, acc);
  }
  store_tile(acc, p.out_stride, out);
}

constexpr int kFloatTile = 6;  // tokens: 12 accumulators of 16 registers

/// Few tokens: several row blocks at once, since one chain alone waits for each addition.
template <PackedFormat kFormat, int kBlocks, int kTokens>
SAGELLM_INLINE void row_blocks_float(const MatmulParams& p, int64_t stride, int64_t token) {
  const uint8_t* weights = static_cast<const uint8_t*>(p.weights);
  float* out = p.out + token * p.out_stride;
  int64_t rb = p.row_block_begin;
  for (; rb + kBlocks <= p.row_block_end; rb += kBlocks) {
    tile_float<kFormat, kBlocks, kTokens>(p, weights + rb * stride, stride, token,
                                          out + rb * kRowBlock);
  }
  for (; rb < p.row_block_end; ++rb) {
    tile_float<kFormat, 1, kTokens>(p, weights + rb * stride, stride, token, out + rb * kRowBlock);
  }
}

/// Row blocks at once with three tokens: the 12 accumulators of two leave no room to widen 16-bit
/// weights.
template <PackedFormat kFormat>
constexpr int kBlocksOfThree = kFormat == PackedFormat::kF32 ? 2 : 1;

template <PackedFormat kFormat>
void matmul_float(const MatmulParams& p) {
  const int64_t stride = row_block_bytes<kFormat>(p.k);
  const uint8_t* weights = static_cast<const uint8_t*>(p.weights);
  // Full tiles: activations of a chunk of tokens stay in L2 while the row blocks pass.
  constexpr int64_t kCacheBytes = 256 * 1024;
  const int64_t tiles = kCacheBytes / (p.k * 4 * kFloatTile);
  const int64_t chunk = (tiles > 0 ? tiles : 1) * kFloatTile;
  const int64_t full = p.num_tokens / kFloatTile * kFloatTile;
  for (int64_t t0 = 0; t0 < full; t0 += chunk) {
    const int64_t t1 = full - t0 < chunk ? full : t0 + chunk;
    for (int64_t rb = p.row_block_begin; rb < p.row_block_end; ++rb) {
      for (int64_t t = t0; t < t1; t += kFloatTile) {
        float* out = p.out + t * p.out_stride + rb * kRowBlock;
        tile_float<kFormat, 1, kFloatTile>(p, weights + rb * stride, stride, t, out);
      }
    }
  }
  switch (p.num_tokens - full) {
    case 1:
      return row_blocks_float<kFormat, 4, 1>(p, stride, full);
    case 2:
      return row_blocks_float<kFormat, 2, 2>(p, stride, full);
    case 3:
      return row_blocks_float<kFormat, kBlocksOfThree<kFormat>, 3>(p, stride, full);
    case 4:
      return row_blocks_float<kFormat, 1, 4>(p, stride, full);
    case 5:
      return row_blocks_float<kFormat, 1, 5>(p, stride, full);
    default:
      return;
  }
}

}  // namespace
}  // namespace sagellm::kernels
