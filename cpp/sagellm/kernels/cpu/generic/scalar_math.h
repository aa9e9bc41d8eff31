// Elementary functions in plain C++, written so that a loop over them vectorises. Same polynomials
// as simd_math.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sagellm::kernels {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLog2ELow = 1.92596299112661e-8f;  // log2(e) - kLog2E
constexpr float kLogMin = -87.33f;  // exp() below this is taken as exp(kLogMin), about 2^-126
constexpr float kLogMax = 88.02f;
constexpr float kRoundMagic =
    12582912.f;  // 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits

inline uint32_t float_bits(float x) { return __builtin_bit_cast(uint32_t, x); }
inline float bits_float(uint32_t u) { return __builtin_bit_cast(float, u); }

inline float bf16_to_float(uint16_t x) { return bits_float(static_cast<uint32_t>(x) << 16); }

/// Nearest even; NaN stays NaN.
inline uint16_t float_to_bf16(float x) {
  const uint32_t u = float_bits(x);
  const uint32_t rounded = u + 0x7fffu + ((u >> 16) & 1u);
  return static_cast<uint16_t>((x != x ? (u | 0x00400000u) : rounded) >> 16);
}

/// 2^fraction * 2^n for |fraction| <= 0.5; `shifted` is n + kRoundMagic. Exactly 1 at 0, 2e-9
/// relative before rounding.
inline float exp2_reduced(float fraction, float shifted) {
  float p = 1.5353362e-4f;
  p = p * fraction + 1.3398874e-3f;
  p = p * fraction + 9.618437e-3f;
  p = p * fraction + 5.5503324e-2f;
  p = p * fraction + 2.4022648e-1f;
  p = p * fraction + 6.931472e-1f;
  p = p * fraction + 1.f;
  return p * bits_float((float_bits(shifted) << 23) + 0x3f800000u);
}

/// 2^x for x <= 127, with x clamped at -126 from below. NaN gives NaN.
inline float exp2(float x) {
  x = x < -126.f ? -126.f : x;
  const float shifted = x + kRoundMagic;
  return exp2_reduced(x - (shifted - kRoundMagic), shifted);
}

/// e^x with x clamped to [kLogMin, kLogMax]. Cody-Waite reduction: ln 2 in two parts, the first
/// exact in products.
inline float exp(float x) {
  x = x < kLogMin ? kLogMin : x;
  x = x > kLogMax ? kLogMax : x;
  const float shifted = x * kLog2E + kRoundMagic;
  const float n = shifted - kRoundMagic;
  const float rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  return exp2_reduced(rest * kLog2E, shifted);
}

constexpr double kDoubleRoundMagic = 6755399441055744.0;  // 1.5 * 2^52

/// 2^x in double for x in [-1000, 0]; see simd_elementwise.h.
inline double exp2(double x) {
  const double shifted = x + kDoubleRoundMagic;
  const double f = x - (shifted - kDoubleRoundMagic);
  double p = 0x1.e9d3fe3952179p-32;
  p = p * f + 0x1.e6063f7217bc6p-28;
  p = p * f + 0x1.b524fae627834p-24;
  p = p * f + 0x1.62bfd47773353p-20;
  p = p * f + 0x1.ffcbfc670dcd4p-17;
  p = p * f + 0x1.430913096fd9fp-13;
  p = p * f + 0x1.5d87fe78a5276p-10;
  p = p * f + 0x1.3b2ab6fba1ddap-7;
  p = p * f + 0x1.c6b08d704a0c2p-5;
  p = p * f + 0x1.ebfbdff82c598p-3;
  p = p * f + 0x1.62e42fefa39efp-1;
  p = p * f + 1.0;
  return __builtin_bit_cast(
      double, __builtin_bit_cast(uint64_t, p) + (__builtin_bit_cast(uint64_t, shifted) << 52));
}

/// tanh(x): odd polynomial below 0.625, (1 - e) / (1 + e) with e = exp(-2|x|) above.
inline float tanh(float x) {
  const float a = __builtin_fabsf(x), x2 = x * x;
  float p = -5.70496e-3f;
  p = p * x2 + 2.0639064e-2f;
  p = p * x2 - 5.3739708e-2f;
  p = p * x2 + 1.3331442e-1f;
  p = p * x2 - 3.333328e-1f;
  const float small = x + x * x2 * p;
  const float e = exp(-2.f * a);
  const float large = __builtin_copysignf((1.f - e) / (1.f + e), x);
  return a < 0.625f ? small : large;
}

/// x / (1 + exp(-y)), without cancellation or overflow. A gate closed beyond float range gives 0,
/// also for x = -inf.
inline float gate(float x, float y) {
  const float e = exp(-__builtin_fabsf(y));
  const float result = x * ((y < 0.f ? e : 1.f) / (1.f + e));
  return y < kLogMin ? 0.f : result;
}

inline float silu(float x) { return gate(x, x); }

/// 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3).
inline float gelu_tanh(float x) {
  return gate(x, x * (x * x * (0.044715f * 1.5957691216f) + 1.5957691216f));
}

/// x * Phi(x); see simd_math.h.
inline float gelu_erf(float x) {
  const float t = 1.f / (1.f + 0.35f * __builtin_fabsf(x));
  float p = -2.914593502e-02f;
  p = p * t + 1.439717184e-01f;
  p = p * t - 2.557142913e-01f;
  p = p * t + 1.591741956e-01f;
  p = p * t - 2.310985417e-02f;
  p = p * t + 1.055080097e-01f;
  p = p * t + 1.198328669e-01f;
  p = p * t + 1.398618697e-01f;
  p = p * t + 1.396214043e-01f;
  const float tail = p * t * exp(-0.5f * (x * x));
  const float result = x * (x < 0.f ? tail : 1.f - tail);
  return x < -14.f ? 0.f : result;
}

}  // namespace
}  // namespace sagellm::kernels
