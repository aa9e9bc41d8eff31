// Activation quantization with AVX-512; see QuantizeParams and generic/quantize.cc, which it equals
// bit for bit.
#include <cstddef>
#include <cstdint>

#include "sagellm/kernels/cpu/avx512/simd.h"
#include "sagellm/kernels/cpu/isa_tables.h"
#include "sagellm/kernels/cpu/mm_layout.h"

namespace sagellm::kernels {
namespace {

void store_bytes(int8_t* out, __m512i v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(v));
}

template <bool kA15>
void quantize_block(const float* x, int8_t* q, int8_t* q_lo, float& d, float& s, int32_t* sum16) {
  const __m512i bits[2] = {_mm512_loadu_si512(x), _mm512_loadu_si512(x + 16)};
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  // Compared as integers NaN beats infinity, and infinity beats the rest.
  const __m512i largest =
      _mm512_max_epi32(_mm512_and_si512(bits[0], magnitude), _mm512_and_si512(bits[1], magnitude));
  d = __builtin_bit_cast(float, _mm512_reduce_max_epi32(largest)) / (kA15 ? kA15Limit : kA8Limit);
  if (d < kMinScale) d = 0.f;
  const bool usable = d >= kMinScale && d <= 3.4e38f;
  const __m512 inverse = _mm512_set1_ps(usable ? 1.f / d : 0.f);
  const __m512i keep = _mm512_set1_epi32(usable ? -1 : 0);
  for (int i = 0; i < 2; ++i) {
    const __m512 scaled = _mm512_mul_ps(_mm512_castsi512_ps(bits[i]), inverse);
    const __m512i value = _mm512_and_si512(_mm512_cvtps_epi32(scaled), keep);
    sum16[i] = _mm512_reduce_add_epi32(value);
    if constexpr (kA15) {
      const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(64)), 7);
      store_bytes(q + 16 * i, high);
      store_bytes(q_lo + 16 * i, _mm512_sub_epi32(value, _mm512_slli_epi32(high, 7)));
    } else {
      store_bytes(q + 16 * i, value);
    }
  }
  s = d * static_cast<float>(sum16[0] + sum16[1]);
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

}  // namespace

void fill_quantize_avx512(KernelTable& table) {
  table.quantize = quantize;
}  // to_bf16: that of avx2

}  // namespace sagellm::kernels
