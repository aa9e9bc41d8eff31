// f32, f16, bf16 and fp8 weights x f32 activations with AVX-512: one fused multiply-add chain per
// output, ascending k.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sagellm/kernels/cpu/avx512/simd.h"
#include "sagellm/kernels/cpu/avx512/tile.h"
#include "sagellm/kernels/params.h"

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

/// The 16 rows of the step at `line`: w[i] belongs to its k = i.
template <PackedFormat kFormat>
SAGELLM_INLINE void load_weights(const uint8_t* line, __m512 (&w)[kStep<kFormat>]) {
  if constexpr (kFormat == PackedFormat::kF32) {
    w[0] = _mm512_loadu_ps(line);
  } else if constexpr (kFormat == PackedFormat::kF16) {
    w[0] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(line)));
  } else if constexpr (kFormat == PackedFormat::kF8) {
    // As halves, whose exponent bias is larger by 8: the values are 256 times too small.
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(line));
    const __m256i high = _mm256_slli_epi16(_mm256_cvtepu8_epi16(codes), 8);
    w[0] =
        _mm512_cvtph_ps(_mm256_andnot_si256(_mm256_set1_epi16(0x4000), _mm256_srai_epi16(high, 1)));
  } else {
    const __m512i pairs = _mm512_loadu_si512(line);
    w[0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    w[1] = _mm512_castsi512_ps(
        _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u))));
  }
}

/// Adds the first kColumns columns of a step to kBlocks x kTokens accumulators; x is token 0 at the
/// step.
template <PackedFormat kFormat, int kColumns, int kBlocks, int kTokens>
SAGELLM_INLINE void add_step(const uint8_t* line, int64_t stride, const float* x, int64_t x_stride,
                             __m512 (&acc)[kBlocks][kTokens]) {
#pragma GCC unroll 8
  for (int b = 0; b < kBlocks; ++b) {
    __m512 weight[kStep<kFormat>];
    load_weights<kFormat>(line + b * stride, weight);
#pragma GCC unroll 2
    for (int i = 0; i < kColumns; ++i) {
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        acc[b][t] = _mm512_fmadd_ps(weight[i], _mm512_set1_ps(x[t * x_stride + i]), acc[b][t]);
      }
    }
  }
}

/// kF8: sums of a group of columns, then its scales.
template <int kBlocks, int kTokens>
void tile_f8(const MatmulParams& p, const uint8_t* w, int64_t stride, int64_t token, float* out) {
  __m512 acc[kBlocks][kTokens];
  clear_tile(acc);
  const float* x = p.x.f32 + token * p.k;
  for (int64_t begin = 0; begin < p.k; begin += kF8Group) {
    const int64_t columns = p.k - begin < kF8Group ? p.k - begin : kF8Group;
    const uint8_t* codes = w + 64;
    __m512 sum[kBlocks][kTokens];
    clear_tile(sum);
    for (int64_t i = 0; i < columns; ++i) {
      add_step<PackedFormat::kF8, 1>(codes + i * 16, stride, x + begin + i, p.k, sum);
    }
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
      const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(w + b * stride), _mm512_set1_ps(256.f));
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) acc[b][t] = _mm512_fmadd_ps(sum[b][t], scale, acc[b][t]);
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
  __m512 acc[kBlocks][kTokens];
  clear_tile(acc);
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

/// All row blocks x kTokens tokens, kBlocks at a time, since few chains alone wait for each
/// addition.
template <PackedFormat kFormat, int kBlocks, int kTokens>
void row_blocks_float(const MatmulParams& p, int64_t stride, int64_t token) {
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

template <PackedFormat kFormat>
void matmul_float(const MatmulParams& p) {
  constexpr int kFloatTile = 12;
  constexpr int64_t kCacheBytes =
      512 * 1024;  // activations that stay in L2 while the row blocks pass
  const int64_t stride = row_block_bytes<kFormat>(p.k);
  const uint8_t* weights = static_cast<const uint8_t*>(p.weights);
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
  int64_t t = full;
  for (; t + 4 <= p.num_tokens; t += 4) row_blocks_float<kFormat, 2, 4>(p, stride, t);
  for (; t + 2 <= p.num_tokens; t += 2) row_blocks_float<kFormat, 4, 2>(p, stride, t);
  if (t < p.num_tokens) row_blocks_float<kFormat, 4, 1>(p, stride, t);
}

}  // namespace
}  // namespace sagellm::kernels
