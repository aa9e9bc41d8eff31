// Quantized weights x int8 activations with AVX-512 VNNI.
//
// A zmm holds the 16 rows of a row block x 4 k, and vpdpbusd multiplies it with four activations of
// one token, broadcast from memory. A unit (16 rows x 32 k) is unpacked into 8 registers for a tile
// of up to 8 tokens.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sagellm/kernels/cpu/avx512/simd.h"
#include "sagellm/kernels/cpu/mm_layout.h"

namespace sagellm::kernels {
namespace {

constexpr int kTile = 8;  // tokens: 8 accumulators, 8 registers of codes

SAGELLM_INLINE __m512 load_halves(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

SAGELLM_INLINE __m512i broadcast32(const void* p) {
  int32_t value;
  __builtin_memcpy(&value, p, 4);
  return _mm512_set1_epi32(value);
}

/// 16 bytes, zero-extended to int32 lanes.
SAGELLM_INLINE __m512i load_u8(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

/// 16 bytes, sign-extended to int32 lanes.
SAGELLM_INLINE __m512i load_s8(const uint8_t* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

/// A unit ready to multiply: code[g] holds k = 4g.. of 16 rows as unsigned bytes.
struct Unit {
  __m512i code[8];
  __m512i scale[2];  // Q6_K: sub-scale of each k half
  __m512 d;
  __m512 m;
};

/// Bit kBit of every byte, moved to bit 4.
template <int kBit>
SAGELLM_INLINE __m512i take_bit(__m512i v) {
  const __m512i mask = _mm512_set1_epi8(0x10);
  if constexpr (kBit < 4) return _mm512_and_si512(_mm512_slli_epi16(v, 4 - kBit), mask);
  return _mm512_and_si512(_mm512_srli_epi16(v, kBit - 4), mask);
}

/// Bits 2*kPair and 2*kPair+1 of every byte, moved to bits 4..5.
template <int kPair>
SAGELLM_INLINE __m512i take_two(__m512i v) {
  const __m512i mask = _mm512_set1_epi8(0x30);
  if constexpr (kPair < 2) return _mm512_and_si512(_mm512_slli_epi16(v, 4 - 2 * kPair), mask);
  return _mm512_and_si512(_mm512_srli_epi16(v, 2 * kPair - 4), mask);
}

/// Codes of the groups j and j + 4.
template <PackedFormat kFormat, int j>
SAGELLM_INLINE void load_codes(const uint8_t* unit, __m512i (&code)[8]) {
  constexpr QuantLayout L = quant_layout(kFormat);
  if constexpr (L.bits == CodeBits::k8) {
    code[j] = _mm512_loadu_si512(unit + j * 64);
    code[j + 4] = _mm512_loadu_si512(unit + (j + 4) * 64);
  } else {
    const __m512i mask = _mm512_set1_epi8(15);
    const __m512i nibbles = _mm512_loadu_si512(unit + j * 64);
    code[j] = _mm512_and_si512(nibbles, mask);
    code[j + 4] = _mm512_and_si512(_mm512_srli_epi16(nibbles, 4), mask);
    if constexpr (L.bits == CodeBits::k5) {
      const __m512i high = _mm512_loadu_si512(unit + 256);
      code[j] = _mm512_or_si512(code[j], take_bit<j>(high));
      code[j + 4] = _mm512_or_si512(code[j + 4], take_bit<j + 4>(high));
    } else if constexpr (L.bits == CodeBits::k6) {
      const __m512i two = _mm512_loadu_si512(unit + 256 + j % 2 * 64);
      code[j] = _mm512_or_si512(code[j], take_two<j / 2>(two));
      code[j + 4] = _mm512_or_si512(code[j + 4], take_two<j / 2 + 2>(two));
    }
  }
}

template <PackedFormat kFormat>
SAGELLM_INLINE void unpack(const uint8_t* row_block, int64_t index, Unit& out) {
  constexpr QuantLayout L = quant_layout(kFormat);
  const uint8_t* group = row_block + index / L.units * L.group_bytes;
  const int64_t u = index % L.units;
  const uint8_t* codes = group + u * L.unit_bytes;
  load_codes<kFormat, 0>(codes, out.code);
  load_codes<kFormat, 1>(codes, out.code);
  load_codes<kFormat, 2>(codes, out.code);
  load_codes<kFormat, 3>(codes, out.code);
  out.d = load_halves(group + L.d);
  out.m = L.has_min ? load_halves(group + L.m) : _mm512_setzero_ps();
  if constexpr (L.units == 8 && L.has_min) {
    const uint8_t* sc = group + L.sub_scales + u * 16;
    out.d = _mm512_mul_ps(out.d, _mm512_cvtepi32_ps(load_u8(sc)));
    out.m = _mm512_mul_ps(out.m, _mm512_cvtepi32_ps(load_u8(sc + 128)));
    out.m = _mm512_xor_ps(out.m, _mm512_set1_ps(-0.f));
  } else if constexpr (kFormat == PackedFormat::kQ6_K) {
    out.scale[0] = load_s8(group + L.sub_scales + 2 * u * 16);
    out.scale[1] = load_s8(group + L.sub_scales + (2 * u + 1) * 16);
  }
}

/// Dot products of the groups [kFirst, kFirst + 4) with one token: `start` plus the codes times X.
template <bool kA15, int kFirst>
SAGELLM_INLINE __m512i half_dot(const Unit& w, const int8_t* q, const int8_t* q_lo, __m512i start) {
  __m512i low = start;
  __m512i high = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int g = kFirst; g < kFirst + 4; ++g) {
    if constexpr (kA15) {
      high = _mm512_dpbusd_epi32(high, w.code[g], broadcast32(q + 4 * g));
      low = _mm512_dpbusd_epi32(low, w.code[g], broadcast32(q_lo + 4 * g));
    } else {
      low = _mm512_dpbusd_epi32(low, w.code[g], broadcast32(q + 4 * g));
    }
  }
  if constexpr (kA15) low = _mm512_add_epi32(low, _mm512_slli_epi32(high, 7));
  return low;
}

/// Exact integer dot product of a unit with one token: in one chain of vpdpbusd, or in two that do
/// not wait for each other when the tile has too few tokens to fill the wait.
template <PackedFormat kFormat, bool kA15, bool kOneChain>
SAGELLM_INLINE __m512i unit_dot(const Unit& w, const int8_t* q, const int8_t* q_lo,
                                const int32_t* sums) {
  constexpr int kZeroPoint = quant_layout(kFormat).zero_point;
  if constexpr (kFormat == PackedFormat::kQ6_K) {
    const __m512i first = half_dot<kA15, 0>(w, q, q_lo, _mm512_set1_epi32(-kZeroPoint * sums[0]));
    const __m512i second = half_dot<kA15, 4>(w, q, q_lo, _mm512_set1_epi32(-kZeroPoint * sums[1]));
    return _mm512_add_epi32(_mm512_mullo_epi32(first, w.scale[0]),
                            _mm512_mullo_epi32(second, w.scale[1]));
  } else {
    const __m512i zero = _mm512_setzero_si512();
    const __m512i start =
        kZeroPoint != 0 ? _mm512_set1_epi32(-kZeroPoint * (sums[0] + sums[1])) : zero;
    const __m512i first = half_dot<kA15, 0>(w, q, q_lo, start);
    const __m512i second = half_dot<kA15, 4>(w, q, q_lo, kOneChain ? first : zero);
    return kOneChain ? second : _mm512_add_epi32(first, second);
  }
}

/// One row block x kTokens tokens from `token`.
template <PackedFormat kFormat, bool kA15, int kTokens>
void tile(const MatmulParams& p, const uint8_t* row_block, int64_t token, float* out) {
  const int64_t units = p.k / kUnit;
  const int8_t* q = p.x.q + token * p.k;
  const int8_t* q_lo = kA15 ? p.x.q_lo + token * p.k : nullptr;
  const float* d = p.x.d + token * units;
  const float* s = p.x.s + token * units;
  const int32_t* sums = p.x.sum16 + 2 * token * units;
  __m512 acc[kTokens];
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) acc[t] = _mm512_setzero_ps();
  for (int64_t u = 0; u < units; ++u) {
    Unit w;
    unpack<kFormat>(row_block, u, w);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const int64_t x = t * p.k + u * kUnit;
      const int64_t block = t * units + u;
      const int8_t* low = kA15 ? q_lo + x : nullptr;
      const __m512i dot = unit_dot<kFormat, kA15, (kTokens > 3)>(w, q + x, low, sums + 2 * block);
      const __m512 scale = _mm512_mul_ps(w.d, _mm512_set1_ps(d[block]));
      acc[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, acc[t]);
      if constexpr (quant_layout(kFormat).has_min) {
        acc[t] = _mm512_fmadd_ps(w.m, _mm512_set1_ps(s[block]), acc[t]);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) _mm512_storeu_ps(out + t * p.out_stride, acc[t]);
}

template <PackedFormat kFormat, bool kA15>
SAGELLM_INLINE void tail_tile(int64_t tokens, const MatmulParams& p, const uint8_t* row_block,
                              int64_t token, float* out) {
  switch (tokens) {
    case 1:
      return tile<kFormat, kA15, 1>(p, row_block, token, out);
    case 2:
      return tile<kFormat, kA15, 2>(p, row_block, token, out);
    case 3:
      return tile<kFormat, kA15, 3>(p, row_block, token, out);
    case 4:
      return tile<kFormat, kA15, 4>(p, row_block, token, out);
    case 5:
      return tile<kFormat, kA15, 5>(p, row_block, token, out);
    case 6:
      return tile<kFormat, kA15, 6>(p, row_block, token, out);
    case 7:
      return tile<kFormat, kA15, 7>(p, row_block, token, out);
    default:
      return;
  }
}

template <PackedFormat kFormat, bool kA15>
void matmul_units(const MatmulParams& p) {
  constexpr QuantLayout L = quant_layout(kFormat);
  constexpr int64_t kCacheBytes =
      512 * 1024;  // activations that stay in L2 while the row blocks pass
  const int64_t stride = p.k / (kUnit * L.units) * L.group_bytes;
  const uint8_t* weights = static_cast<const uint8_t*>(p.weights);
  const int64_t tiles = kCacheBytes / (p.k * (kA15 ? 2 : 1) * kTile);
  const int64_t chunk = (tiles > 0 ? tiles : 1) * kTile;
  for (int64_t t0 = 0; t0 < p.num_tokens; t0 += chunk) {
    const int64_t t1 = p.num_tokens - t0 < chunk ? p.num_tokens : t0 + chunk;
    for (int64_t rb = p.row_block_begin; rb < p.row_block_end; ++rb) {
      const uint8_t* row_block = weights + rb * stride;
      float* out = p.out + rb * kRowBlock;
      int64_t t = t0;
      for (; t + kTile <= t1; t += kTile)
        tile<kFormat, kA15, kTile>(p, row_block, t, out + t * p.out_stride);
      tail_tile<kFormat, kA15>(t1 - t, p, row_block, t, out + t * p.out_stride);
    }
  }
}

template <PackedFormat kFormat>
void matmul_quantized(const MatmulParams& p) {
  if (p.x.q_lo != nullptr) return matmul_units<kFormat, true>(p);
  return matmul_units<kFormat, false>(p);
}

}  // namespace
}  // namespace sagellm::kernels
