// Activation quantization with AVX2; see QuantizeParams and generic/quantize.cc, which it equals
// bit for bit.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "sagellm/kernels/cpu/isa_tables.h"
#include "sagellm/kernels/cpu/mm_layout.h"

namespace sagellm::kernels {
namespace {

/// Largest |x| of a block by integer comparison, so that NaN beats infinity and infinity beats the
/// rest.
float absmax(const __m256i (&bits)[4]) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  __m256i best = _mm256_and_si256(bits[0], mask);
  for (int i = 1; i < 4; ++i) best = _mm256_max_epi32(best, _mm256_and_si256(bits[i], mask));
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(best), _mm256_extracti128_si256(best, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
  return __builtin_bit_cast(float, _mm_cvtsi128_si32(four));
}

int32_t sum_lanes(__m256i v) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1));
  return _mm_cvtsi128_si32(four);
}

/// Stores 32 int32 in [-128, 127] as int8.
void store_bytes(int8_t* out, const __m256i (&v)[4]) {
  const __m256i words0 = _mm256_packs_epi32(v[0], v[1]);
  const __m256i words1 = _mm256_packs_epi32(v[2], v[3]);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // undoes the per-lane packing
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words0, words1), order);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), bytes);
}

template <bool kA15>
void quantize_block(const float* x, int8_t* q, int8_t* q_lo, float& d, float& s, int32_t* sum16) {
  __m256i bits[4];
  for (int i = 0; i < 4; ++i)
    bits[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 8 * i));
  d = absmax(bits) / (kA15 ? kA15Limit : kA8Limit);
  if (d < kMinScale) d = 0.f;
  const bool usable = d >= kMinScale && d <= 3.4e38f;
  const __m256 inverse = _mm256_set1_ps(usable ? 1.f / d : 0.f);
  const __m256i keep = _mm256_set1_epi32(usable ? -1 : 0);
  __m256i value[4];
  for (int i = 0; i < 4; ++i) {
    const __m256 scaled = _mm256_mul_ps(_mm256_castsi256_ps(bits[i]), inverse);
    value[i] = _mm256_and_si256(_mm256_cvtps_epi32(scaled), keep);
  }
  sum16[0] = sum_lanes(_mm256_add_epi32(value[0], value[1]));
  sum16[1] = sum_lanes(_mm256_add_epi32(value[2], value[3]));
  s = d * static_cast<float>(sum16[0] + sum16[1]);
  if constexpr (kA15) {
    __m256i high[4];
    for (int i = 0; i < 4; ++i) {
      high[i] = _mm256_srai_epi32(_mm256_add_epi32(value[i], _mm256_set1_epi32(64)), 7);
      value[i] = _mm256_sub_epi32(value[i], _mm256_slli_epi32(high[i], 7));
    }
    store_bytes(q, high);
    store_bytes(q_lo, value);
  } else {
    store_bytes(q, value);
  }
}

template <bool kA15>
void quantize_rows(const QuantizeParams& p) {
  const int64_t units = p.k / kUnit;
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    for (int64_t u = 0; u < units; ++u) {
      const int64_t block = t * units + u;
      quantize_block<kA15>(p.x + t * p.x_stride + u * kUnit, p.q + block * kUnit,
                           kA15 ? p.q_lo + block * kUnit : nullptr, p.d[block], p.s[block],
                           p.sum16 + 2 * block);
    }
  }
}

void quantize(const QuantizeParams& p) {
  return p.q_lo != nullptr ? quantize_rows<true>(p) : quantize_rows<false>(p);
}

/// 8 floats as bfloat16 in the low half of each lane: nearest even, NaN stays NaN.
__m256i round_bf16(const float* x) {
  const __m256 value = _mm256_loadu_ps(x);
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
}

void to_bf16(const float* x, uint16_t* out, int64_t n) {
  const auto store16 = [](uint16_t* to, __m256i low, __m256i high) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), words);
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store16(out + i, round_bf16(x + i), round_bf16(x + i + 8));
  if (i < n) {
    float rest[16] = {};
    uint16_t rounded[16];
    for (int64_t j = i; j < n; ++j) rest[j - i] = x[j];
    store16(rounded, round_bf16(rest), round_bf16(rest + 8));
    for (int64_t j = i; j < n; ++j) out[j] = rounded[j - i];
  }
}

}  // namespace

void fill_quantize_avx2(KernelTable& table) {
  table.quantize = quantize;
  table.to_bf16 = to_bf16;
}

}  // namespace sagellm::kernels
