// Activation quantization with AVX2; see QuantizeParams and generic/quantize.cc, which it equals bit for bit.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "sagellm/kernels/cpu/isa_tables.h"
#include "sagellm/kernels/cpu/mm_layout.h"

namespace sagellm::kernels {
namespace {

/// Largest |x| of a block by integer comparison, so that NaN beats infinity and infinity beats the rest.
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
  for (int i = 0; i < 4; ++i) bits[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 8 * i));
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
                           kA15 ? p.q_lo + block * kUnit : nullptr, p.d[block], p.s[block], p.sum16 + 2 * block);
    }
  }
}

void quantize(const QuantizeParams& p) { return p.q_lo != nullptr ? quantize_rows<true>(p) : quantize_rows<false>(p); }

}  // namespace

void fill_quantize_avx2(KernelTable& table) { table.quantize = quantize; }

}  // namespace sagellm::kernels
