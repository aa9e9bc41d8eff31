// Sums of kBlocks row blocks x kTokens tokens: 16 rows a register.
#pragma once

#include <cstdint>

#include "sagellm/kernels/cpu/avx512/simd.h"
#include "sagellm/kernels/params.h"

namespace sagellm::kernels {
namespace {

template <int kBlocks, int kTokens>
SAGELLM_INLINE void clear_tile(__m512 (&acc)[kBlocks][kTokens]) {
#pragma GCC unroll 8
  for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) acc[b][t] = _mm512_setzero_ps();
  }
}

/// To `out`, where a token's row of floats is `stride` from the next.
template <int kBlocks, int kTokens>
SAGELLM_INLINE void store_tile(const __m512 (&acc)[kBlocks][kTokens], int64_t stride, float* out) {
#pragma GCC unroll 8
  for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) _mm512_storeu_ps(out + t * stride + b * kRowBlock, acc[b][t]);
  }
}

}  // namespace
}  // namespace sagellm::kernels
