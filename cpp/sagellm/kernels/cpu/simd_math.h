// Elementary functions over one vector register, written once for every SIMD instruction set.
//
// Include after the folder's vmath.h, which supplies the primitives (Vec, IntVec, Mask, kLanes,
// load, fma, ...). Everything is in an anonymous namespace: an ISA object must not define symbols
// that another one could share.
//
// Accuracy (tests/kernels/test_elementwise.py): exp2, exp, tanh within 3e-7 relative; NaN
// propagates.
#pragma once

namespace sagellm::kernels {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLog2ELow = 1.92596299112661e-8f;  // log2(e) - kLog2E
constexpr float kLogMin = -87.33f;  // exp() below this is taken as exp(kLogMin), about 2^-126
constexpr float kLogMax = 88.02f;

/// 2^(fraction + exponent): minimax polynomial of degree 6 on [-0.5, 0.5] (2e-9 relative, exactly 1
/// at 0), then an integer addition to the exponent field. NaN in `fraction` survives (the exponent
/// of NaN is 0 mod 2^9).
inline Vec exp2_reduced(Vec fraction, IntVec exponent) {
  Vec p = set(1.5353362e-4f);
  p = fma(p, fraction, set(1.3398874e-3f));
  p = fma(p, fraction, set(9.618437e-3f));
  p = fma(p, fraction, set(5.5503324e-2f));
  p = fma(p, fraction, set(2.4022648e-1f));
  p = fma(p, fraction, set(6.931472e-1f));
  p = fma(p, fraction, set(1.f));
  return add_to_exponent(p, exponent);
}

/// 2^x for x <= 127, with x clamped at -126 from below.
inline Vec exp2(Vec x) {
  x = max(set(-126.f), x);  // the second operand wins when it is NaN
  const IntVec n = round_to_int(x);
  return exp2_reduced(sub(x, to_float(n)), n);
}

/// e^x with x clamped to [kLogMin, kLogMax]. The reduced argument is computed with two fma, so that
/// the result stays accurate for large |x|.
inline Vec exp(Vec x) {
  x = min(set(kLogMax), max(set(kLogMin), x));
  const IntVec n = round_to_int(mul(x, set(kLog2E)));
  Vec f = fma(x, set(kLog2E), negate(to_float(n)));
  f = fma(x, set(kLog2ELow), f);
  return exp2_reduced(f, n);
}

/// tanh(x): odd polynomial below 0.625 (4e-9 relative), (1 - e) / (1 + e) with e = exp(-2|x|)
/// above.
inline Vec tanh(Vec x) {
  const Vec a = abs(x);
  const Vec x2 = mul(x, x);
  Vec p = set(-5.70496e-3f);
  p = fma(p, x2, set(2.0639064e-2f));
  p = fma(p, x2, set(-5.3739708e-2f));
  p = fma(p, x2, set(1.3331442e-1f));
  p = fma(p, x2, set(-3.333328e-1f));
  const Vec small = fma(mul(x, x2), p, x);
  const Vec e = exp(mul(a, set(-2.f)));
  const Vec large = copy_sign(div(sub(set(1.f), e), add(set(1.f), e)), x);
  return select(less(a, set(0.625f)), small, large);
}

/// x / (1 + exp(-y)), without cancellation or overflow. A gate closed beyond float range gives 0,
/// also for x = -inf.
inline Vec gate(Vec x, Vec y) {
  const Vec e = exp(negate(abs(y)));
  const Vec numerator = select(less(y, zero()), e, set(1.f));
  const Vec result = mul(x, div(numerator, add(set(1.f), e)));
  return select(less(y, set(kLogMin)), zero(), result);
}

inline Vec silu(Vec x) { return gate(x, x); }

/// 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3).
inline Vec gelu_tanh(Vec x) {
  const Vec inner = fma(mul(x, x), set(0.044715f * 1.5957691216f), set(1.5957691216f));
  return gate(x, mul(x, inner));
}

/// x * Phi(x) = x * erfc(-x / sqrt(2)) / 2. For a = |x|: Phi(-a) = exp(-a^2 / 2) * t * P(t) with
/// t = 1 / (1 + 0.35 a), P a minimax polynomial of degree 8 (4e-8 relative for a <= 14), beyond
/// which the tail is 0 in floats.
inline Vec gelu_erf(Vec x) {
  const Vec a = abs(x);
  const Vec t = div(set(1.f), fma(a, set(0.35f), set(1.f)));
  Vec p = set(-2.914593502e-02f);
  p = fma(p, t, set(1.439717184e-01f));
  p = fma(p, t, set(-2.557142913e-01f));
  p = fma(p, t, set(1.591741956e-01f));
  p = fma(p, t, set(-2.310985417e-02f));
  p = fma(p, t, set(1.055080097e-01f));
  p = fma(p, t, set(1.198328669e-01f));
  p = fma(p, t, set(1.398618697e-01f));
  p = fma(p, t, set(1.396214043e-01f));
  const Vec tail = mul(mul(p, t), exp(mul(mul(x, x), set(-0.5f))));
  const Vec phi = select(less(x, zero()), tail, sub(set(1.f), tail));
  return select(less(x, set(-14.f)), zero(), mul(x, phi));
}

/// How a row of floats becomes signed integers of at most `largest_code`: code = round(x *
/// inverse), x ~= code * scale.
struct CodeScale {
  float scale;
  float inverse;
};

/// From the largest magnitude of n values, n a multiple of kLanes. Values too small to divide by
/// give 0 and 0; one that is not finite gives a NaN scale, and codes of 0.
inline CodeScale code_scale(const float* x, int n, float largest_code) {
  Vec largest = zero(), sum = zero();  // sum: zeros, or NaN when a value is not finite
  for (int i = 0; i < n; i += kLanes) {
    const Vec v = load(x + i);
    largest = max(abs(v), largest);
    sum = fma(v, zero(), sum);
  }
  const float magnitude = reduce_max(largest), poison = reduce_add(sum);
  if (poison != 0.f) return {__builtin_nanf(""), 0.f};
  if (magnitude < kMinCodedMagnitude) return {0.f, 0.f};
  return {magnitude / largest_code, largest_code / magnitude};
}

}  // namespace
}  // namespace sagellm::kernels
