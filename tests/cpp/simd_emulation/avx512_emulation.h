// AVX-512 by SIMDe on machines that have AVX2 only, plus the few intrinsics that SIMDe 0.7.4 lacks.
// Included by kernels/cpu/avx512/simd.h when SAGELLM_SIMDE is defined. For tests: slow, but every
// lane computes what the real instruction computes (bf16 dot products differ in the rounding of
// their intermediate sums).
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <immintrin.h>
#include <simde/x86/avx512.h>

#include <cstdint>

namespace sagellm::kernels::emulation {
namespace {

/// Applies `op` to each of the 16 lanes of `v`.
template <typename Out, typename To, typename From, typename In, typename Op>
inline Out map16(const In& v, Op op) {
  From in[16];
  To out[16];
  static_assert(sizeof(in) == sizeof(v) && sizeof(out) == sizeof(Out));
  __builtin_memcpy(in, &v, sizeof(in));
  for (int i = 0; i < 16; ++i) out[i] = op(in[i]);
  Out result;
  __builtin_memcpy(&result, out, sizeof(out));
  return result;
}

/// Applies an AVX2 conversion to both halves of the lanes.
template <typename Out, typename Half, typename Quarter, typename In, typename Op>
inline Out halves(const In& v, Op op) {
  Quarter in[2];
  Half out[2];
  static_assert(sizeof(in) == sizeof(v) && sizeof(out) == sizeof(Out));
  __builtin_memcpy(in, &v, sizeof(in));
  for (int i = 0; i < 2; ++i) out[i] = op(in[i]);
  Out result;
  __builtin_memcpy(&result, out, sizeof(out));
  return result;
}

inline __m512 cvtph_ps(__m256i v) {
  return halves<__m512, __m256, __m128i>(v, [](__m128i h) { return _mm256_cvtph_ps(h); });
}
inline __m512i cvtps_epi32(__m512 v) {
  return halves<__m512i, __m256i, __m256>(v, [](__m256 h) { return _mm256_cvtps_epi32(h); });
}
inline __m512 cvtepi32_ps(__m512i v) {
  return halves<__m512, __m256, __m256i>(v, [](__m256i h) { return _mm256_cvtepi32_ps(h); });
}
inline __m512d cvtps_pd(__m256 v) {
  return halves<__m512d, __m256d, __m128>(v, [](__m128 h) { return _mm256_cvtps_pd(h); });
}
inline __m512i cvtepi8_epi32(__m128i v) {
  return map16<__m512i, int32_t, int8_t>(v, [](int8_t x) { return int32_t{x}; });
}
inline __m512i cvtepu8_epi32(__m128i v) {
  return map16<__m512i, int32_t, uint8_t>(v, [](uint8_t x) { return int32_t{x}; });
}
inline __m128i cvtepi32_epi8(__m512i v) {
  return map16<__m128i, int8_t, int32_t>(v, [](int32_t x) { return static_cast<int8_t>(x); });
}
inline __m256i cvtepi32_epi16(__m512i v) {
  return map16<__m256i, int16_t, int32_t>(v, [](int32_t x) { return static_cast<int16_t>(x); });
}
inline __m512i srai_epi32(__m512i v, unsigned count) {
  return map16<__m512i, int32_t, int32_t>(v, [count](int32_t x) { return x >> count; });
}
inline int32_t reduce_add_epi32(__m512i v) {
  uint32_t sum = 0;
  map16<__m512i, int32_t, int32_t>(
      v, [&sum](int32_t x) { return sum += static_cast<uint32_t>(x), x; });
  return static_cast<int32_t>(sum);
}
inline int32_t reduce_max_epi32(__m512i v) {
  int32_t best = INT32_MIN;
  map16<__m512i, int32_t, int32_t>(v, [&best](int32_t x) { return best = x > best ? x : best, x; });
  return best;
}
/// To nearest even; like the instruction, subnormals become zero and NaN becomes quiet.
inline __m256i cvtneps_pbh(__m512 v) {
  return map16<__m256i, uint16_t, uint32_t>(v, [](uint32_t u) {
    const uint32_t magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(u >> 16 | 0x40u);
    if (magnitude < 0x00800000u) return static_cast<uint16_t>(u >> 16 & 0x8000u);
    return static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
  });
}

}  // namespace
}  // namespace sagellm::kernels::emulation

#undef _mm512_cvtph_ps
#undef _mm512_cvtps_epi32
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtps_pd
#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtepi32_epi8
#undef _mm512_cvtepi32_epi16
#undef _mm512_srai_epi32
#undef _mm512_reduce_add_epi32
#undef _mm512_reduce_max_epi32
#undef _mm512_cvtneps_pbh
#define _mm512_cvtph_ps(v) sagellm::kernels::emulation::cvtph_ps(v)
#define _mm512_cvtps_epi32(v) sagellm::kernels::emulation::cvtps_epi32(v)
#define _mm512_cvtepi32_ps(v) sagellm::kernels::emulation::cvtepi32_ps(v)
#define _mm512_cvtps_pd(v) sagellm::kernels::emulation::cvtps_pd(v)
#define _mm512_cvtepi8_epi32(v) sagellm::kernels::emulation::cvtepi8_epi32(v)
#define _mm512_cvtepu8_epi32(v) sagellm::kernels::emulation::cvtepu8_epi32(v)
#define _mm512_cvtepi32_epi8(v) sagellm::kernels::emulation::cvtepi32_epi8(v)
#define _mm512_cvtepi32_epi16(v) sagellm::kernels::emulation::cvtepi32_epi16(v)
#define _mm512_srai_epi32(v, count) sagellm::kernels::emulation::srai_epi32(v, count)
#define _mm512_reduce_add_epi32(v) sagellm::kernels::emulation::reduce_add_epi32(v)
#define _mm512_reduce_max_epi32(v) sagellm::kernels::emulation::reduce_max_epi32(v)
#define _mm512_cvtneps_pbh(v) sagellm::kernels::emulation::cvtneps_pbh(v)
