// Activation quantization in portable C++; see QuantizeParams.
#include <cstddef>
#include <cstdint>

#include "sagellm/kernels/cpu/isa_tables.h"
#include "sagellm/kernels/cpu/mm_layout.h"

namespace sagellm::kernels {
namespace {

/// Largest |x| of a block by integer comparison, so that NaN beats infinity and infinity beats the
/// rest.
float absmax(const float* x) {
  uint32_t best = 0;
  for (int i = 0; i < kUnit; ++i) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x[i]) & 0x7fffffffu;
    best = bits > best ? bits : best;
  }
  return __builtin_bit_cast(float, best);
}

/// Rounds to nearest even; |x| < 2^22.
int32_t round_even(float x) {
  constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: its ulp is 1
  return static_cast<int32_t>((x + kMagic) - kMagic);
}

template <bool kA15>
void quantize_block(const float* x, int8_t* q, int8_t* q_lo, float& d, float& s, int32_t* sum16) {
  d = absmax(x) / (kA15 ? kA15Limit : kA8Limit);
  if (d < kMinScale) d = 0.f;
  // A block with NaN or infinity keeps that in d, with X = 0: the products are NaN.
  const bool usable = d >= kMinScale && d <= 3.4e38f;
  const float inverse = usable ? 1.f / d : 0.f;
  int32_t sum[2] = {0, 0};
  for (int i = 0; i < kUnit; ++i) {
    const int32_t value = usable ? round_even(x[i] * inverse) : 0;
    sum[i / 16] += value;
    if constexpr (kA15) {
      const int32_t high = (value + 64) >> 7;
      q[i] = static_cast<int8_t>(high);
      q_lo[i] = static_cast<int8_t>(value - 128 * high);
    } else {
      q[i] = static_cast<int8_t>(value);
    }
  }
  sum16[0] = sum[0];
  sum16[1] = sum[1];
  s = d * static_cast<float>(sum[0] + sum[1]);
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

/// Rounds to nearest even; NaN stays NaN.
void to_bf16(const float* x, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x[i]);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = is_nan ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u);
    out[i] = static_cast<uint16_t>(rounded >> 16);
  }
}

}  // namespace

void fill_quantize_generic(KernelTable& table) {
  table.quantize = quantize;
  table.to_bf16 = to_bf16;
}

}  // namespace sagellm::kernels
