// avx512/vmath.h plus the instructions of AVX512_BF16.
#pragma once

#include "../avx512/vmath.h"

namespace sagellm::kernels {
namespace {

/// acc + even * even + odd * odd per 32-bit lane of bfloat16 pairs.
inline Vec dot_pairs(Vec acc, IntVec a, IntVec b) {
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}
/// Nearest bfloat16 value of x >= 0, ties upwards; NaN stays NaN.
inline Vec round_positive_bf16(Vec x) {
  return as_float(keep_bits(_mm512_add_epi32(bits_of(x), _mm512_set1_epi32(0x8000)), 0xffff0000u));
}
/// Rounds 16 floats to bfloat16 (nearest even).
inline void store_bf16(uint16_t* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
}

}  // namespace
}  // namespace sagellm::kernels
