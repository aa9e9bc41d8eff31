// AVX2 primitives: the vector vocabulary that simd_math.h, simd_elementwise.h and simd_attention.h
// are written in.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace sagellm::kernels {
namespace {

using Vec = __m256;
using IntVec = __m256i;
using Mask = __m256;
constexpr int kLanes = 8;

inline Vec set(float x) { return _mm256_set1_ps(x); }
inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a*b
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }                // b when either is NaN
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), a); }
inline Vec negate(Vec a) { return _mm256_xor_ps(_mm256_set1_ps(-0.f), a); }
inline Vec copy_sign(Vec magnitude, Vec sign) {
  return _mm256_or_ps(abs(magnitude), _mm256_and_ps(_mm256_set1_ps(-0.f), sign));
}

inline Mask less(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
inline Vec select(Mask mask, Vec yes, Vec no) { return _mm256_blendv_ps(no, yes, mask); }
/// Bit i is set when lanes i of a and b are equal (never for NaN).
inline unsigned equal_bits(Vec a, Vec b) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)));
}
/// Lane i is on when begin <= first + i < end.
inline Mask range_mask(int first, int begin, int end) {
  const __m256i index =
      _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(begin), index);
  return _mm256_castsi256_ps(
      _mm256_andnot_si256(below, _mm256_cmpgt_epi32(_mm256_set1_epi32(end), index)));
}

inline IntVec round_to_int(Vec a) {
  return _mm256_cvtps_epi32(a);
}  // to nearest even; NaN gives INT_MIN
inline Vec to_float(IntVec a) { return _mm256_cvtepi32_ps(a); }
inline Vec add_to_exponent(Vec a, IntVec n) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(n, 23)));
}

// bfloat16 pairs: a 32-bit lane holds the even element in its low half.
inline IntVec load_pairs(const uint16_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline Vec even_element(IntVec pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline Vec odd_element(IntVec pairs) {
  return _mm256_castsi256_ps(
      _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline IntVec keep_bits(IntVec a, uint32_t bits) {
  return _mm256_and_si256(a, _mm256_set1_epi32(static_cast<int>(bits)));
}

/// Rounds to bfloat16 (nearest even, NaN stays NaN), one per lane in the low half, the high half
/// cleared.
inline IntVec round_bf16(Vec x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x00400000));
  const __m256 is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(is_nan)), 16);
}
/// Stores the low halves of the lanes, consecutively.
inline void store_low16(uint16_t* p, IntVec v) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(v, v), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store_pairs(uint16_t* p, IntVec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
}
inline IntVec or_high16(IntVec low, IntVec value16) {
  return _mm256_or_si256(low, _mm256_slli_epi32(value16, 16));
}

// Integer codes.
inline IntVec zero_int() { return _mm256_setzero_si256(); }
/// 2 * kLanes bytes to signed 16-bit pairs.
inline IntVec load_code_pairs(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline IntVec broadcast_pair(const uint16_t* p) {
  int pair;
  __builtin_memcpy(&pair, p, sizeof(pair));
  return _mm256_set1_epi32(pair);
}
/// acc + even * even + odd * odd per 32-bit lane of signed 16-bit pairs.
inline IntVec dot_codes(IntVec acc, IntVec a, IntVec b) {
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
  __asm__("" : "+x"(acc));  // a chain: GCC would reassociate it and keep its terms in memory
  return acc;
}
/// Stores the low bytes of the lanes, consecutively.
inline void store_low8(int8_t* p, IntVec v) {
  const __m256i low = keep_bits(v, 0xffu);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
  const __m128i words128 = _mm256_castsi256_si128(words);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words128, words128));
}

/// Fixed reduction trees: (i, i+4), (i, i+2), (0, 1).
inline float reduce_add(Vec v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline float reduce_max(Vec v) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}

/// Eight double sums in lane order.
struct DoubleSums {
  __m256d low, high;
};
inline DoubleSums double_zero() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
inline DoubleSums double_add(DoubleSums s, Vec v) {
  return {_mm256_add_pd(s.low, _mm256_cvtps_pd(_mm256_castps256_ps128(v))),
          _mm256_add_pd(s.high, _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)))};
}
inline double double_reduce(DoubleSums s) {
  double lane[4];
  _mm256_storeu_pd(lane, _mm256_add_pd(s.low, s.high));
  return (lane[0] + lane[1]) + (lane[2] + lane[3]);
}

// Doubles, half as many lanes.
using DoubleVec = __m256d;
inline DoubleVec set_double(double x) { return _mm256_set1_pd(x); }
inline void store(double* p, DoubleVec v) { _mm256_storeu_pd(p, v); }
inline DoubleVec add(DoubleVec a, DoubleVec b) { return _mm256_add_pd(a, b); }
inline DoubleVec sub(DoubleVec a, DoubleVec b) { return _mm256_sub_pd(a, b); }
inline DoubleVec mul(DoubleVec a, DoubleVec b) { return _mm256_mul_pd(a, b); }
inline DoubleVec fma(DoubleVec a, DoubleVec b, DoubleVec c) { return _mm256_fmadd_pd(a, b, c); }
inline DoubleVec load_widened(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
/// v where a >= b, 0 elsewhere.
inline DoubleVec zero_if_less(DoubleVec a, DoubleVec b, DoubleVec v) {
  return _mm256_and_pd(_mm256_cmp_pd(a, b, _CMP_GE_OQ), v);
}
/// Adds the low 12 bits of `bits` to the sign and exponent fields of `a`.
inline DoubleVec add_low_bits_to_exponent(DoubleVec a, DoubleVec bits) {
  return _mm256_castsi256_pd(
      _mm256_add_epi64(_mm256_castpd_si256(a), _mm256_slli_epi64(_mm256_castpd_si256(bits), 52)));
}
inline double reduce_add(DoubleVec v) {
  double lane[4];
  store(lane, v);
  return (lane[0] + lane[1]) + (lane[2] + lane[3]);
}

inline void prefetch_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace
}  // namespace sagellm::kernels
