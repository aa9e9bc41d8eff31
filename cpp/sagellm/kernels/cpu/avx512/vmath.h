// AVX-512 primitives: the same vocabulary as avx2/vmath.h, 16 lanes wide.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simd.h"

namespace sagellm::kernels {
namespace {

using Vec = __m512;
using IntVec = __m512i;
using Mask = __mmask16;
constexpr int kLanes = 16;

inline IntVec bits_of(Vec a) { return _mm512_castps_si512(a); }
inline Vec as_float(IntVec a) { return _mm512_castsi512_ps(a); }

inline Vec set(float x) { return _mm512_set1_ps(x); }
inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a*b
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }                // b when either is NaN
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec abs(Vec a) {
  return as_float(_mm512_and_si512(bits_of(a), _mm512_set1_epi32(0x7fffffff)));
}
inline Vec negate(Vec a) {
  return as_float(_mm512_xor_si512(bits_of(a), _mm512_set1_epi32(static_cast<int>(0x80000000u))));
}
inline Vec copy_sign(Vec magnitude, Vec sign) {
  const IntVec bit = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  return as_float(_mm512_or_si512(bits_of(abs(magnitude)), _mm512_and_si512(bits_of(sign), bit)));
}

inline Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Vec select(Mask mask, Vec yes, Vec no) { return _mm512_mask_blend_ps(mask, no, yes); }
/// Bit i is set when lanes i of a and b are equal (never for NaN).
inline unsigned equal_bits(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
/// Lane i is on when begin <= first + i < end.
inline Mask range_mask(int first, int begin, int end) {
  const int from = begin <= first ? 0 : (begin - first < 16 ? begin - first : 16);
  const int to = end <= first ? 0 : (end - first < 16 ? end - first : 16);
  return static_cast<Mask>(((1u << to) - 1u) & ~((1u << from) - 1u));
}

inline IntVec round_to_int(Vec a) {
  return _mm512_cvtps_epi32(a);
}  // to nearest even; NaN gives INT_MIN
inline Vec to_float(IntVec a) { return _mm512_cvtepi32_ps(a); }
inline Vec add_to_exponent(Vec a, IntVec n) {
  return as_float(_mm512_add_epi32(bits_of(a), _mm512_slli_epi32(n, 23)));
}

// bfloat16 pairs: a 32-bit lane holds the even element in its low half.
inline IntVec load_pairs(const uint16_t* p) { return _mm512_loadu_si512(p); }
inline Vec even_element(IntVec pairs) { return as_float(_mm512_slli_epi32(pairs, 16)); }
inline Vec odd_element(IntVec pairs) {
  return as_float(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline IntVec keep_bits(IntVec a, uint32_t bits) {
  return _mm512_and_si512(a, _mm512_set1_epi32(static_cast<int>(bits)));
}

/// Rounds to bfloat16 (nearest even, NaN stays NaN), one per lane in the low half, the high half
/// cleared.
inline IntVec round_bf16(Vec x) {
  const IntVec u = bits_of(x);
  const IntVec odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const IntVec rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const IntVec quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x00400000));
  const Mask is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_srli_epi32(_mm512_mask_blend_epi32(is_nan, rounded, quiet), 16);
}
/// Stores the low halves of the lanes, consecutively.
inline void store_low16(uint16_t* p, IntVec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
}
inline void store_pairs(uint16_t* p, IntVec v) { _mm512_storeu_si512(p, v); }
inline IntVec or_high16(IntVec low, IntVec value16) {
  return _mm512_or_si512(low, _mm512_slli_epi32(value16, 16));
}

// Integer codes.
inline IntVec zero_int() { return _mm512_setzero_si512(); }
/// 2 * kLanes bytes to signed 16-bit pairs.
inline IntVec load_code_pairs(const int8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline IntVec broadcast_pair(const uint16_t* p) {
  int pair;
  __builtin_memcpy(&pair, p, sizeof(pair));
  return _mm512_set1_epi32(pair);
}
/// acc + even * even + odd * odd per 32-bit lane of signed 16-bit pairs.
inline IntVec dot_codes(IntVec acc, IntVec a, IntVec b) { return _mm512_dpwssd_epi32(acc, a, b); }
/// Stores the low bytes of the lanes, consecutively.
inline void store_low8(int8_t* p, IntVec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
}

inline __m256 low_half(Vec v) { return _mm512_castps512_ps256(v); }
inline __m256 high_half(Vec v) {
  return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
}

/// Fixed reduction trees: (i, i+8), (i, i+4), (i, i+2), (0, 1).
inline float reduce_add(Vec v) {
  const __m256 half = _mm256_add_ps(low_half(v), high_half(v));
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline float reduce_max(Vec v) {
  const __m256 half = _mm256_max_ps(low_half(v), high_half(v));
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}

/// Sixteen double sums in lane order, four per register.
struct DoubleSums {
  __m256d part[4];
};
inline DoubleSums double_zero() {
  const __m256d z = _mm256_setzero_pd();
  return {{z, z, z, z}};
}
inline DoubleSums double_add(DoubleSums s, Vec v) {
  const __m256 low = low_half(v), high = high_half(v);
  return {{_mm256_add_pd(s.part[0], _mm256_cvtps_pd(_mm256_castps256_ps128(low))),
           _mm256_add_pd(s.part[1], _mm256_cvtps_pd(_mm256_extractf128_ps(low, 1))),
           _mm256_add_pd(s.part[2], _mm256_cvtps_pd(_mm256_castps256_ps128(high))),
           _mm256_add_pd(s.part[3], _mm256_cvtps_pd(_mm256_extractf128_ps(high, 1)))}};
}
inline double double_reduce(DoubleSums s) {
  double lane[4];
  _mm256_storeu_pd(lane, _mm256_add_pd(_mm256_add_pd(s.part[0], s.part[1]),
                                       _mm256_add_pd(s.part[2], s.part[3])));
  return (lane[0] + lane[1]) + (lane[2] + lane[3]);
}

// Doubles, half as many lanes.
using DoubleVec = __m512d;
inline DoubleVec set_double(double x) { return _mm512_set1_pd(x); }
inline void store(double* p, DoubleVec v) { _mm512_storeu_pd(p, v); }
inline DoubleVec add(DoubleVec a, DoubleVec b) { return _mm512_add_pd(a, b); }
inline DoubleVec sub(DoubleVec a, DoubleVec b) { return _mm512_sub_pd(a, b); }
inline DoubleVec mul(DoubleVec a, DoubleVec b) { return _mm512_mul_pd(a, b); }
inline DoubleVec fma(DoubleVec a, DoubleVec b, DoubleVec c) { return _mm512_fmadd_pd(a, b, c); }
inline DoubleVec load_widened(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
/// v where a >= b, 0 elsewhere.
inline DoubleVec zero_if_less(DoubleVec a, DoubleVec b, DoubleVec v) {
  return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(a, b, _CMP_GE_OQ), v);
}
/// Adds the low 12 bits of `bits` to the sign and exponent fields of `a`.
inline DoubleVec add_low_bits_to_exponent(DoubleVec a, DoubleVec bits) {
  return _mm512_castsi512_pd(
      _mm512_add_epi64(_mm512_castpd_si512(a), _mm512_slli_epi64(_mm512_castpd_si512(bits), 52)));
}
inline double reduce_add(DoubleVec v) {
  double lane[8];
  store(lane, v);
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

inline void prefetch_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace
}  // namespace sagellm::kernels
