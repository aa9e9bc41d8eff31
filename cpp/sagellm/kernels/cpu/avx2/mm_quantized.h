// Quantized weights x int8 activations with AVX2.
//
// A ymm holds 8 of the 16 rows of a row block x 4 k. A unit (16 rows x 32 k) is unpacked once for
// up to kGroup tokens, then multiplied in one of two ways; both give the exact integer dot product
// of a unit:
//   bytes: vpmaddubsw of codes and broadcast activations, summed in int16 for as long as that
//   cannot overflow; words: vpmaddwd of 16-bit codes (zero point removed) and 16-bit activations.
//   One pass whatever the activation
//          has 8 or 15 bits, and no overflow for 8-bit codes.
// After that every path does the same float operations in the same order (params.h).
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "sagellm/kernels/cpu/mm_layout.h"

#define SAGELLM_INLINE inline __attribute__((always_inline))

namespace sagellm::kernels {
namespace {

constexpr int kGroup = 32;      // tokens that share one unpacking of the weights
constexpr int kManyTokens = 8;  // from here on arithmetic is the bound, not memory

SAGELLM_INLINE __m256i load256(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

SAGELLM_INLINE __m256 load_halves(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

SAGELLM_INLINE __m256i broadcast32(const void* p) {
  int32_t value;
  __builtin_memcpy(&value, p, 4);
  return _mm256_set1_epi32(value);
}

SAGELLM_INLINE __m256i broadcast64(const void* p) {
  int64_t value;
  __builtin_memcpy(&value, p, 8);
  return _mm256_set1_epi64x(value);
}

/// Keeps a value in its register. Without it GCC turns the chains of integer additions into trees,
/// whose many live products do not fit 16 registers, and loads codes again for every token.
SAGELLM_INLINE void pin(__m256i& value) { __asm__("" : "+x"(value)); }

// ----------------------------------------------------------------------------------------------
// unpacking

/// Bit kBit of every byte, moved to bit 4.
template <int kBit>
SAGELLM_INLINE __m256i take_bit(__m256i v) {
  const __m256i mask = _mm256_set1_epi8(0x10);
  if constexpr (kBit < 4) return _mm256_and_si256(_mm256_slli_epi16(v, 4 - kBit), mask);
  return _mm256_and_si256(_mm256_srli_epi16(v, kBit - 4), mask);
}

/// Bits 2*kPair and 2*kPair+1 of every byte, moved to bits 4..5.
template <int kPair>
SAGELLM_INLINE __m256i take_two(__m256i v) {
  const __m256i mask = _mm256_set1_epi8(0x30);
  if constexpr (kPair < 2) return _mm256_and_si256(_mm256_slli_epi16(v, 4 - 2 * kPair), mask);
  return _mm256_and_si256(_mm256_srli_epi16(v, 2 * kPair - 4), mask);
}

/// Codes of 8 rows (`half` of the row block): k = 4j.. in `low`, k = 16+4j.. in `high`.
template <PackedFormat kFormat, int j>
SAGELLM_INLINE void load_codes(const uint8_t* unit, int half, __m256i& low, __m256i& high) {
  constexpr QuantLayout L = quant_layout(kFormat);
  if constexpr (L.bits == CodeBits::k8) {
    low = load256(unit + j * 64 + half * 32);
    high = load256(unit + (j + 4) * 64 + half * 32);
  } else {
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i nibbles = load256(unit + j * 64 + half * 32);
    low = _mm256_and_si256(nibbles, mask);
    high = _mm256_and_si256(_mm256_srli_epi16(nibbles, 4), mask);
    if constexpr (L.bits == CodeBits::k5) {
      const __m256i bits = load256(unit + 256 + half * 32);
      low = _mm256_or_si256(low, take_bit<j>(bits));
      high = _mm256_or_si256(high, take_bit<j + 4>(bits));
    } else if constexpr (L.bits == CodeBits::k6) {
      const __m256i two = load256(unit + 256 + j % 2 * 64 + half * 32);
      low = _mm256_or_si256(low, take_two<j / 2>(two));
      high = _mm256_or_si256(high, take_two<j / 2 + 2>(two));
    }
  }
}

/// Where unit `index` of a row block lies.
struct UnitPointer {
  const uint8_t* group;
  const uint8_t* codes;
  int64_t index;  // in the group
};

/// Asks for the weights 2 KB behind the present group. Left to the hardware's prefetcher a core of
/// Zen 3 reads one row block after the other at 60 to 77 % of what memory gives it, and K-quants,
/// whose scales lie behind the codes, at 40 %; with this, at 90 % and more. Past the end of the
/// matrix it asks for the next one, or for nothing: a prefetch does not fault.
template <PackedFormat kFormat>
SAGELLM_INLINE void prefetch_ahead(const uint8_t* row_block, int64_t index) {
  constexpr QuantLayout L = quant_layout(kFormat);
  constexpr int64_t kBytes = L.group_bytes / L.units;
  const uint8_t* ahead = row_block + index * kBytes + L.group_bytes + 2048;
#pragma GCC unroll 9
  for (int64_t i = 0; i < kBytes; i += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(ahead + i), _MM_HINT_T0);
  }
}

template <PackedFormat kFormat>
SAGELLM_INLINE UnitPointer unit_pointer(const uint8_t* row_block, int64_t index) {
  constexpr QuantLayout L = quant_layout(kFormat);
  const uint8_t* group = row_block + index / L.units * L.group_bytes;
  const int64_t u = index % L.units;
  return {group, group + u * L.unit_bytes, u};
}

/// d and m of 8 rows: the unit adds d * d_x * (integer dot) + m * s_x.
template <PackedFormat kFormat>
SAGELLM_INLINE void load_scales(const UnitPointer& p, int half, __m256& d, __m256& m) {
  constexpr QuantLayout L = quant_layout(kFormat);
  d = load_halves(p.group + L.d + half * 16);
  m = L.has_min ? load_halves(p.group + L.m + half * 16) : _mm256_setzero_ps();
  if constexpr (L.units == 8 && L.has_min) {
    const uint8_t* sc = p.group + L.sub_scales + p.index * 16 + half * 8;
    const __m128i scale = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(sc));
    const __m128i min = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(sc + 128));
    d = _mm256_mul_ps(d, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(scale)));
    m = _mm256_mul_ps(m, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(min)));
    m = _mm256_xor_ps(m, _mm256_set1_ps(-0.f));
  }
}

/// Q6_K: the sub-scale of 8 rows for one half of the unit's k, as int32 lanes.
SAGELLM_INLINE __m256i load_sub_scale(const UnitPointer& p, int half, int k_half) {
  constexpr QuantLayout L = quant_layout(PackedFormat::kQ6_K);
  const uint8_t* sc = p.group + L.sub_scales + (2 * p.index + k_half) * 16 + half * 8;
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(sc)));
}

/// Both int16 of every lane become the low int16 of that lane.
SAGELLM_INLINE __m256i twice16(__m256i v) {
  return _mm256_or_si256(_mm256_slli_epi32(v, 16), _mm256_and_si256(v, _mm256_set1_epi32(0xffff)));
}

// ------------------------------------------------------------------------------------- the float
// operations

/// One output lane per row; the same two fused operations per unit for every tile shape.
template <PackedFormat kFormat>
SAGELLM_INLINE __m256 accumulate(__m256 acc, __m256i dot, __m256 d, __m256 m, __m256 d_x,
                                 __m256 s_x) {
  acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_mul_ps(d, d_x), acc);
  if constexpr (quant_layout(kFormat).has_min) acc = _mm256_fmadd_ps(m, s_x, acc);
  return acc;
}

/// What a tile reads of the activations: token 0 of the tile, one unit.
struct TileInput {
  const int8_t* q;
  const int8_t* q_lo;
  const float* d;
  const float* s;
  const int32_t* sum16;
  const int16_t* words;  // word path: [tokens][kUnit], widened
  int64_t k;             // from one token to the next in q
  int64_t units;         // from one token to the next in d, s (and sum16 / 2)
};

// ------------------------------------------------------------------------------------------------
// byte path

/// A unit as unsigned bytes: code[g] holds k = 4g.. of 8 rows.
struct ByteUnit {
  __m256i code[2][8];
  __m256i scale[2][2];  // Q6_K: sub-scale of each k half, int32 lanes
  __m256 d[2];
  __m256 m[2];
};

template <PackedFormat kFormat>
SAGELLM_INLINE void unpack(const uint8_t* row_block, int64_t index, ByteUnit& out) {
  const UnitPointer p = unit_pointer<kFormat>(row_block, index);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    load_codes<kFormat, 0>(p.codes, half, out.code[half][0], out.code[half][4]);
    load_codes<kFormat, 1>(p.codes, half, out.code[half][1], out.code[half][5]);
    load_codes<kFormat, 2>(p.codes, half, out.code[half][2], out.code[half][6]);
    load_codes<kFormat, 3>(p.codes, half, out.code[half][3], out.code[half][7]);
    load_scales<kFormat>(p, half, out.d[half], out.m[half]);
    if constexpr (kFormat == PackedFormat::kQ6_K) {
      out.scale[half][0] = load_sub_scale(p, half, 0);
      out.scale[half][1] = load_sub_scale(p, half, 1);
    }
  }
}

/// Groups of 4 k whose products may be summed in int16: groups * 2 * max code * 127 < 32768.
constexpr int int16_groups(PackedFormat format) {
  switch (quant_layout(format).bits) {
    case CodeBits::k4:
      return 8;
    case CodeBits::k5:
      return 4;
    default:
      return 2;
  }
}

/// Dot products of a unit with one plane of kTokens tokens, without zero point (Q6_K: with
/// sub-scales).
template <PackedFormat kFormat, int kTokens>
SAGELLM_INLINE void dot_bytes(const ByteUnit& w, const int8_t* q, int64_t k,
                              __m256i (&sum)[kTokens][2]) {
  constexpr int kStep = int16_groups(kFormat);
#pragma GCC unroll 4
  for (int g0 = 0; g0 < 8; g0 += kStep) {
    __m256i partial[kTokens][2];
#pragma GCC unroll 8
    for (int g = g0; g < g0 + kStep; ++g) {
      __m256i code[2] = {w.code[0][g], w.code[1][g]};
      if constexpr (kTokens > 2) {
        pin(code[0]);  // loaded once, not once per token
        pin(code[1]);
      }
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const __m256i x = broadcast32(q + t * k + 4 * g);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m256i product = _mm256_maddubs_epi16(code[half], x);
          partial[t][half] = g == g0 ? product : _mm256_add_epi16(partial[t][half], product);
          pin(partial[t][half]);
        }
      }
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i factor =
          kFormat == PackedFormat::kQ6_K ? twice16(w.scale[half][g0 / 4]) : _mm256_set1_epi16(1);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const __m256i dot = _mm256_madd_epi16(partial[t][half], factor);
        sum[t][half] = g0 == 0 ? dot : _mm256_add_epi32(sum[t][half], dot);
        pin(sum[t][half]);
      }
    }
  }
}

/// The part of the dot product that the zero point adds; `sums` are the sums of X over each half of
/// k.
template <PackedFormat kFormat>
SAGELLM_INLINE __m256i zero_point_part(const ByteUnit& w, const int32_t* sums, int half) {
  constexpr int kZeroPoint = quant_layout(kFormat).zero_point;
  if constexpr (kFormat == PackedFormat::kQ6_K) {
    const __m256i first = _mm256_mullo_epi32(w.scale[half][0], broadcast32(sums));
    const __m256i second = _mm256_mullo_epi32(w.scale[half][1], broadcast32(sums + 1));
    return _mm256_slli_epi32(_mm256_add_epi32(first, second), __builtin_ctz(kZeroPoint));
  } else {
    const __m256i both = broadcast64(sums);
    const __m256i sum = _mm256_add_epi32(both, _mm256_shuffle_epi32(both, 0xb1));
    return _mm256_slli_epi32(sum, __builtin_ctz(kZeroPoint));
  }
}

template <PackedFormat kFormat, bool kA15, int kTokens>
SAGELLM_INLINE void tile_bytes(const ByteUnit& w, const TileInput& x, __m256 (*acc)[2]) {
  __m256i sum[kTokens][2];
  dot_bytes<kFormat, kTokens>(w, x.q, x.k, sum);
  if constexpr (kA15) {
    __m256i low[kTokens][2];
    dot_bytes<kFormat, kTokens>(w, x.q_lo, x.k, low);
    for (int t = 0; t < kTokens; ++t) {
      for (int half = 0; half < 2; ++half) {
        sum[t][half] = _mm256_add_epi32(_mm256_slli_epi32(sum[t][half], 7), low[t][half]);
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) {
    const __m256 d_x = _mm256_set1_ps(x.d[t * x.units]);
    const __m256 s_x = _mm256_set1_ps(x.s[t * x.units]);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      if constexpr (quant_layout(kFormat).zero_point != 0) {
        sum[t][half] = _mm256_sub_epi32(
            sum[t][half], zero_point_part<kFormat>(w, x.sum16 + 2 * t * x.units, half));
      }
      acc[t][half] =
          accumulate<kFormat>(acc[t][half], sum[t][half], w.d[half], w.m[half], d_x, s_x);
    }
  }
}

/// The byte path: A8 at any width, A15 (two passes) for one token.
template <PackedFormat kFormat, bool kA15>
struct BytePath {
  using Unit = ByteUnit;
  // Formats that need int32 partial sums keep fewer tokens in registers.
  static constexpr int kTile = int16_groups(kFormat) == 8 ? 4 : 2;
  static constexpr int kBlocks = 1;

  static SAGELLM_INLINE void prepare(const TileInput&, int64_t, int16_t*) {}

  template <int kTokens>
  static SAGELLM_INLINE void tile(const Unit& w, const TileInput& x, __m256 (*acc)[2]) {
    tile_bytes<kFormat, kA15, kTokens>(w, x, acc);
  }
};

// ------------------------------------------------------------------------------------------------
// word path

/// A unit as int16 weights: code[2g] holds k = 4g, 4g+2 of 8 rows, code[2g+1] holds k = 4g+1, 4g+3.
struct WordUnit {
  __m256i code[2][16];
  __m256 d[2];
  __m256 m[2];
};

template <PackedFormat kFormat>
SAGELLM_INLINE void split_words(__m256i codes, __m256i scale, __m256i& even, __m256i& odd) {
  constexpr int kZeroPoint = quant_layout(kFormat).zero_point;
  even = _mm256_and_si256(codes, _mm256_set1_epi16(0xff));
  odd = _mm256_srli_epi16(codes, 8);
  if constexpr (kZeroPoint != 0) {
    even = _mm256_sub_epi16(even, _mm256_set1_epi16(kZeroPoint));
    odd = _mm256_sub_epi16(odd, _mm256_set1_epi16(kZeroPoint));
  }
  if constexpr (kFormat == PackedFormat::kQ6_K) {
    even = _mm256_mullo_epi16(even, scale);
    odd = _mm256_mullo_epi16(odd, scale);
  }
}

template <PackedFormat kFormat, int j>
SAGELLM_INLINE void unpack_words(const UnitPointer& p, int half, const __m256i (&scale)[2],
                                 __m256i (&code)[16]) {
  __m256i low;
  __m256i high;
  load_codes<kFormat, j>(p.codes, half, low, high);
  split_words<kFormat>(low, scale[0], code[2 * j], code[2 * j + 1]);
  split_words<kFormat>(high, scale[1], code[2 * j + 8], code[2 * j + 9]);
}

template <PackedFormat kFormat>
SAGELLM_INLINE void unpack(const uint8_t* row_block, int64_t index, WordUnit& out) {
  const UnitPointer p = unit_pointer<kFormat>(row_block, index);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    __m256i scale[2] = {};
    if constexpr (kFormat == PackedFormat::kQ6_K) {
      scale[0] = twice16(load_sub_scale(p, half, 0));
      scale[1] = twice16(load_sub_scale(p, half, 1));
    }
    unpack_words<kFormat, 0>(p, half, scale, out.code[half]);
    unpack_words<kFormat, 1>(p, half, scale, out.code[half]);
    unpack_words<kFormat, 2>(p, half, scale, out.code[half]);
    unpack_words<kFormat, 3>(p, half, scale, out.code[half]);
    load_scales<kFormat>(p, half, out.d[half], out.m[half]);
  }
}

/// 32 activations of one token as int16, in the order of WordUnit: 0 2 1 3, 4 6 5 7, ...
template <bool kA15>
SAGELLM_INLINE void widen(const int8_t* q, const int8_t* q_lo, int16_t* out) {
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15,  //
                                         0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    __m256i x = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q + 16 * i)));
    if constexpr (kA15) {
      const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q_lo + 16 * i));
      x = _mm256_add_epi16(_mm256_slli_epi16(x, 7), _mm256_cvtepi8_epi16(low));
    }
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + 16 * i), _mm256_shuffle_epi8(x, order));
  }
}

template <PackedFormat kFormat, int kTokens>
SAGELLM_INLINE void tile_words(const WordUnit& w, const TileInput& x, __m256 (*acc)[2]) {
  __m256i sum[kTokens][2];
#pragma GCC unroll 16
  for (int e = 0; e < 16; ++e) {
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      const __m256i pair = broadcast32(x.words + t * kUnit + 2 * e);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m256i dot = _mm256_madd_epi16(w.code[half][e], pair);
        sum[t][half] = e == 0 ? dot : _mm256_add_epi32(sum[t][half], dot);
        pin(sum[t][half]);
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) {
    const __m256 d_x = _mm256_set1_ps(x.d[t * x.units]);
    const __m256 s_x = _mm256_set1_ps(x.s[t * x.units]);
    acc[t][0] = accumulate<kFormat>(acc[t][0], sum[t][0], w.d[0], w.m[0], d_x, s_x);
    acc[t][1] = accumulate<kFormat>(acc[t][1], sum[t][1], w.d[1], w.m[1], d_x, s_x);
  }
}

/// The word path: A15 for two tokens and more, and Q8_0 always.
template <PackedFormat kFormat, bool kA15>
struct WordPath {
  using Unit = WordUnit;
  static constexpr int kTile = 4;
  static constexpr int kBlocks = 4;  // share one widening of the activations

  static SAGELLM_INLINE void prepare(const TileInput& x, int64_t count, int16_t* words) {
    for (int64_t t = 0; t < count; ++t) {
      widen<kA15>(x.q + t * x.k, kA15 ? x.q_lo + t * x.k : nullptr, words + t * kUnit);
    }
    __asm__("" : : "r"(words) : "memory");  // broadcasts shall come from memory
  }

  template <int kTokens>
  static SAGELLM_INLINE void tile(const Unit& w, const TileInput& x, __m256 (*acc)[2]) {
    tile_words<kFormat, kTokens>(w, x, acc);
  }
};

// -------------------------------------------------------------------------------------------------
// drivers

template <typename Path, int kMaxTokens>
SAGELLM_INLINE void tail_tile(int64_t tokens, const typename Path::Unit& w, const TileInput& x,
                              __m256 (*acc)[2]) {
  if (tokens == 1) return Path::template tile<1>(w, x, acc);
  if constexpr (kMaxTokens > 2 && Path::kTile > 2) {
    if (tokens == 2) return Path::template tile<2>(w, x, acc);
    if (tokens == 3) return Path::template tile<3>(w, x, acc);
  }
}

SAGELLM_INLINE TileInput tile_input(const MatmulParams& p, const int16_t* words, int64_t token,
                                    int64_t unit) {
  const int64_t units = p.k / kUnit;
  const int64_t block = token * units + unit;
  const int64_t q = block * kUnit;
  return {p.x.q + q,
          p.x.q_lo != nullptr ? p.x.q_lo + q : nullptr,
          p.x.d + block,
          p.x.s + block,
          p.x.sum16 + 2 * block,
          words,
          p.k,
          units};
}

/// kBlocks row blocks x `count` <= kMaxTokens tokens from `token`.
template <PackedFormat kFormat, typename Path, int kBlocks, int kMaxTokens>
void row_block_group(const MatmulParams& p, const uint8_t* row_blocks, int64_t stride,
                     int64_t token, int64_t count, float* out) {
  if constexpr (kMaxTokens == 1) count = 1;  // known: the accumulators stay in registers
  __m256 acc[kBlocks][kMaxTokens][2];
  for (int b = 0; b < kBlocks; ++b) {
    for (int64_t t = 0; t < count; ++t) acc[b][t][0] = acc[b][t][1] = _mm256_setzero_ps();
  }
  alignas(32) int16_t words[kMaxTokens * kUnit];
  const int64_t units = p.k / kUnit;
  for (int64_t u = 0; u < units; ++u) {
    Path::prepare(tile_input(p, nullptr, token, u), count, words);
    for (int b = 0; b < kBlocks; ++b) {
      const uint8_t* row_block = row_blocks + b * stride;
      prefetch_ahead<kFormat>(row_block, u);
      typename Path::Unit w;
      unpack<kFormat>(row_block, u, w);
      int64_t t = 0;
      if constexpr (kMaxTokens >= Path::kTile) {
        for (; t + Path::kTile <= count; t += Path::kTile) {
          const TileInput x = tile_input(p, words + t * kUnit, token + t, u);
          Path::template tile<Path::kTile>(w, x, acc[b] + t);
        }
      }
      tail_tile<Path, kMaxTokens>(count - t, w, tile_input(p, words + t * kUnit, token + t, u),
                                  acc[b] + t);
    }
  }
  for (int b = 0; b < kBlocks; ++b) {
    for (int64_t t = 0; t < count; ++t) {
      float* row = out + t * p.out_stride + b * kRowBlock;
      _mm256_storeu_ps(row, acc[b][t][0]);
      _mm256_storeu_ps(row + 8, acc[b][t][1]);
    }
  }
}

/// Tokens whose activations stay in L2 while all row blocks pass over them: a multiple of kGroup.
SAGELLM_INLINE int64_t tokens_in_cache(int64_t bytes_per_token) {
  constexpr int64_t kCacheBytes = 256 * 1024;
  const int64_t groups = kCacheBytes / (bytes_per_token * kGroup);
  return (groups > 0 ? groups : 1) * kGroup;
}

/// kBlocks row blocks from `rb` x the tokens [begin, end), in groups of kMaxTokens.
template <PackedFormat kFormat, typename Path, int kBlocks, int kMaxTokens>
SAGELLM_INLINE void row_block_tokens(const MatmulParams& p, int64_t rb, int64_t begin,
                                     int64_t end) {
  constexpr QuantLayout L = quant_layout(kFormat);
  const int64_t stride = p.k / (kUnit * L.units) * L.group_bytes;
  const uint8_t* row_blocks = static_cast<const uint8_t*>(p.weights) + rb * stride;
  for (int64_t t = begin; t < end; t += kMaxTokens) {
    const int64_t count = end - t < kMaxTokens ? end - t : kMaxTokens;
    float* out = p.out + t * p.out_stride + rb * kRowBlock;
    row_block_group<kFormat, Path, kBlocks, kMaxTokens>(p, row_blocks, stride, t, count, out);
  }
}

template <PackedFormat kFormat, typename Path, int kMaxTokens>
void matmul_units(const MatmulParams& p) {
  constexpr int kBlocks = kMaxTokens == 1 ? 1 : Path::kBlocks;
  const int64_t cached = tokens_in_cache(p.k * (p.x.q_lo != nullptr ? 2 : 1));
  for (int64_t t0 = 0; t0 < p.num_tokens; t0 += cached) {
    const int64_t t1 = p.num_tokens - t0 < cached ? p.num_tokens : t0 + cached;
    int64_t rb = p.row_block_begin;
    if constexpr (kBlocks > 1) {
      // With few tokens the weights come from memory, which likes one stream best.
      const int64_t end = p.num_tokens < kManyTokens ? rb : p.row_block_end;
      for (; rb + kBlocks <= end; rb += kBlocks) {
        row_block_tokens<kFormat, Path, kBlocks, kMaxTokens>(p, rb, t0, t1);
      }
    }
    for (; rb < p.row_block_end; ++rb) {
      row_block_tokens<kFormat, Path, 1, kMaxTokens>(p, rb, t0, t1);
    }
  }
}

template <PackedFormat kFormat, typename Path>
SAGELLM_INLINE void matmul_by(const MatmulParams& p) {
  if (p.num_tokens == 1) return matmul_units<kFormat, Path, 1>(p);
  return matmul_units<kFormat, Path, kGroup>(p);
}

template <PackedFormat kFormat>
void matmul_quantized(const MatmulParams& p) {
  const bool a15 = p.x.q_lo != nullptr;
  if constexpr (quant_layout(kFormat).bits == CodeBits::k8) {
    if (a15) return matmul_by<kFormat, WordPath<kFormat, true>>(p);
    return matmul_by<kFormat, WordPath<kFormat, false>>(p);
  } else {
    if (!a15) return matmul_by<kFormat, BytePath<kFormat, false>>(p);
    if (p.num_tokens == 1) return matmul_units<kFormat, BytePath<kFormat, true>, 1>(p);
    return matmul_units<kFormat, WordPath<kFormat, true>, kGroup>(p);
  }
}

}  // namespace
}  // namespace sagellm::kernels
