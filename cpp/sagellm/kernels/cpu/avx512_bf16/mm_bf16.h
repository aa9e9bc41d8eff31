// bf16 weights x bf16 activations with vdpbf16ps: per output one chain over ascending pairs of k.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sagellm/kernels/cpu/avx512/simd.h"
#include "sagellm/kernels/cpu/avx512/tile.h"
#include "sagellm/kernels/params.h"

namespace sagellm::kernels {
namespace {

/// kBlocks row blocks x kTokens tokens over `pairs` pairs of k.
template <int kBlocks, int kTokens>
void tile_bf16(const MatmulParams& p, const uint8_t* w, int64_t pairs, int64_t token, float* out) {
  const int64_t stride = pairs * 64;
  const uint16_t* x = p.x.bf16 + token * pairs * 2;
  __m512 acc[kBlocks][kTokens];
  clear_tile(acc);
  for (int64_t i = 0; i < pairs; ++i) {
    __m512i weight[kBlocks];
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) weight[b] = _mm512_loadu_si512(w + b * stride + i * 64);
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      int32_t pair;
      __builtin_memcpy(&pair, x + (t * pairs + i) * 2, 4);
      const __m512i value = _mm512_set1_epi32(pair);
#pragma GCC unroll 8
      for (int b = 0; b < kBlocks; ++b)
        acc[b][t] = _mm512_dpbf16_ps(acc[b][t], (__m512bh)weight[b], (__m512bh)value);
    }
  }
  store_tile(acc, p.out_stride, out);
}

/// Row blocks [begin, end) x kTokens tokens, kBlocks at a time.
template <int kBlocks, int kTokens>
SAGELLM_INLINE void row_blocks_bf16(const MatmulParams& p, int64_t pairs, int64_t token) {
  const uint8_t* weights = static_cast<const uint8_t*>(p.weights);
  float* out = p.out + token * p.out_stride;
  int64_t rb = p.row_block_begin;
  for (; rb + kBlocks <= p.row_block_end; rb += kBlocks) {
    tile_bf16<kBlocks, kTokens>(p, weights + rb * pairs * 64, pairs, token, out + rb * kRowBlock);
  }
  for (; rb < p.row_block_end; ++rb) {
    tile_bf16<1, kTokens>(p, weights + rb * pairs * 64, pairs, token, out + rb * kRowBlock);
  }
}

/// Two row blocks (or one) x all full tiles of [t0, t1).
template <int kBlocks, int kTokens>
SAGELLM_INLINE void tiles_bf16(const MatmulParams& p, int64_t pairs, int64_t rb, int64_t t0,
                               int64_t t1) {
  const uint8_t* w = static_cast<const uint8_t*>(p.weights) + rb * pairs * 64;
  for (int64_t t = t0; t < t1; t += kTokens) {
    tile_bf16<kBlocks, kTokens>(p, w, pairs, t, p.out + t * p.out_stride + rb * kRowBlock);
  }
}

void matmul_bf16(const MatmulParams& p) {
  constexpr int kTokens = 12;  // x 2 row blocks: 24 accumulators of 32 registers
  constexpr int64_t kCacheBytes =
      512 * 1024;  // activations that stay in L2 while the row blocks pass
  const int64_t pairs = (p.k + 1) / 2;
  const int64_t tiles = kCacheBytes / (pairs * 4 * kTokens);
  const int64_t chunk = (tiles > 0 ? tiles : 1) * kTokens;
  const int64_t full = p.num_tokens / kTokens * kTokens;
  for (int64_t t0 = 0; t0 < full; t0 += chunk) {
    const int64_t t1 = full - t0 < chunk ? full : t0 + chunk;
    int64_t rb = p.row_block_begin;
    for (; rb + 2 <= p.row_block_end; rb += 2) tiles_bf16<2, kTokens>(p, pairs, rb, t0, t1);
    if (rb < p.row_block_end) tiles_bf16<1, kTokens>(p, pairs, rb, t0, t1);
  }
  // The rest: the fewer tokens, the more row blocks run side by side to cover the latency of a
  // chain.
  int64_t t = full;
  for (; t + 4 <= p.num_tokens; t += 4) row_blocks_bf16<4, 4>(p, pairs, t);
  for (; t + 2 <= p.num_tokens; t += 2) row_blocks_bf16<4, 2>(p, pairs, t);
  if (t < p.num_tokens) row_blocks_bf16<8, 1>(p, pairs, t);
}

}  // namespace
}  // namespace sagellm::kernels
