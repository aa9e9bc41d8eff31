// Element-wise kernels over vector registers, written once for every SIMD instruction set.
//
// Include after the folder's vmath.h, simd_math.h and kv_page.h. A tail shorter than a register
// goes through the same vector code on a zero-padded copy, so an element's result depends on its
// inputs only and never on its place in the array or on how threads share the array. Sums run in an
// order fixed by n alone.
#pragma once

namespace sagellm::kernels {
namespace {

inline Vec load_part(const float* p, int64_t count) {
  alignas(64) float buffer[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = p[i];
  return load(buffer);
}
inline void store_part(float* p, Vec v, int64_t count) {
  alignas(64) float buffer[kLanes];
  store(buffer, v);
  for (int64_t i = 0; i < count; ++i) p[i] = buffer[i];
}

template <class Fn>
inline void map1(const float* a, int64_t n, float* out, Fn fn) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, fn(load(a + i)));
  if (i < n) store_part(out + i, fn(load_part(a + i, n - i)), n - i);
}

template <class Fn>
inline void map2(const float* a, const float* b, int64_t n, float* out, Fn fn) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, fn(load(a + i), load(b + i)));
  if (i < n) store_part(out + i, fn(load_part(a + i, n - i), load_part(b + i, n - i)), n - i);
}

inline void to_bf16(const float* x, uint16_t* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_low16(out + i, round_bf16(load(x + i)));
  if (i < n) {
    uint16_t buffer[kLanes];
    store_low16(buffer, round_bf16(load_part(x + i, n - i)));
    for (int64_t j = 0; i + j < n; ++j) out[i + j] = buffer[j];
  }
}

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
  Vec sum0 = zero(), sum1 = zero();
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Vec a = load(x + i), b = load(x + i + kLanes);
    sum0 = fma(a, a, sum0);
    sum1 = fma(b, b, sum1);
  }
  for (; i < n; i += kLanes) {
    const Vec a = n - i >= kLanes ? load(x + i) : load_part(x + i, n - i);
    sum0 = fma(a, a, sum0);
  }
  const float mean = reduce_add(add(sum0, sum1)) / static_cast<float>(n);
  const Vec factor = set(1.f / __builtin_sqrtf(mean + eps));
  map2(x, weight, n, out, [factor](Vec a, Vec w) { return mul(mul(a, factor), w); });
}

void add_arrays(const float* a, const float* b, int64_t n, float* out) {
  map2(a, b, n, out, [](Vec x, Vec y) { return add(x, y); });
}

void scale(float* x, float factor, int64_t n) {
  const Vec f = set(factor);
  map1(x, n, x, [f](Vec a) { return mul(a, f); });
}

void rope(float* x, const float* cos, const float* sin, int64_t rot) {
  const int64_t half = rot / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t left = half - i;
    if (left >= kLanes) {
      const Vec a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
      store(x + i, fnma(b, s, mul(a, c)));
      store(x + half + i, fma(a, s, mul(b, c)));
    } else {
      const Vec a = load_part(x + i, left), b = load_part(x + half + i, left);
      const Vec c = load_part(cos + i, left), s = load_part(sin + i, left);
      store_part(x + i, fnma(b, s, mul(a, c)), left);
      store_part(x + half + i, fma(a, s, mul(b, c)), left);
    }
  }
}

void silu_mul(const float* gate_in, const float* up, int64_t n, float* out) {
  map2(gate_in, up, n, out, [](Vec g, Vec u) { return mul(silu(g), u); });
}

void gelu_tanh_mul(const float* gate_in, const float* up, int64_t n, float* out) {
  map2(gate_in, up, n, out, [](Vec g, Vec u) { return mul(gelu_tanh(g), u); });
}

void softcap(float* x, float cap, int64_t n) {
  const Vec c = set(cap);
  map1(x, n, x, [c](Vec a) { return mul(c, tanh(div(a, c))); });
}

void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t n,
                float* out) {
  const auto sum_of = [n, x](auto fn) {
    Vec sum0 = zero(), sum1 = zero();
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      sum0 = fn(load(x + i), sum0);
      sum1 = fn(load(x + i + kLanes), sum1);
    }
    for (; i + kLanes <= n; i += kLanes) sum0 = fn(load(x + i), sum0);
    if (i < n) {
      const Vec last = fn(load_part(x + i, n - i), zero());
      sum1 = add(sum1, select(range_mask(0, 0, static_cast<int>(n - i)), last, zero()));
    }
    return reduce_add(add(sum0, sum1)) / static_cast<float>(n);
  };
  const Vec mean = set(sum_of([](Vec v, Vec sum) { return add(sum, v); }));
  const float variance = sum_of([mean](Vec v, Vec sum) {
    const Vec d = sub(v, mean);
    return fma(d, d, sum);
  });
  const Vec factor = set(1.f / __builtin_sqrtf(variance + eps));
  const auto apply = [mean, factor](Vec v, Vec w, Vec b) {
    return fma(mul(sub(v, mean), factor), w, b);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(out + i, apply(load(x + i), load(weight + i), load(bias + i)));
  if (i < n) {
    const int64_t left = n - i;
    const Vec last =
        apply(load_part(x + i, left), load_part(weight + i, left), load_part(bias + i, left));
    store_part(out + i, last, left);
  }
}

void bias_gelu(const float* x, const float* bias, int64_t n, float* out) {
  map2(x, bias, n, out, [](Vec v, Vec b) { return gelu_erf(add(v, b)); });
}

void softmax(float* x, int64_t n) {
  Vec largest = set(x[0]);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) largest = max(load(x + i), largest);
  float top = reduce_max(largest);
  for (; i < n; ++i) top = x[i] > top ? x[i] : top;

  const Vec m = set(top);
  Vec sum = zero();
  for (i = 0; i + kLanes <= n; i += kLanes) {
    const Vec e = exp(sub(load(x + i), m));
    store(x + i, e);
    sum = add(sum, e);
  }
  if (i < n) {
    const Vec e = exp(sub(load_part(x + i, n - i), m));
    store_part(x + i, e, n - i);
    sum = add(sum, select(range_mask(0, 0, static_cast<int>(n - i)), e, zero()));
  }
  scale(x, 1.f / reduce_add(sum), n);
}

void argmax(const float* x, int64_t n, float* value, int32_t* index) {
  Vec best = set(-__builtin_inff());
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    best = max(load(x + i), best);  // a NaN leaves `best` as it is
  float largest = reduce_max(best);
  for (; i < n; ++i) largest = x[i] > largest ? x[i] : largest;

  const Vec target = set(largest);
  for (i = 0; i + kLanes <= n; i += kLanes) {
    const unsigned hits = equal_bits(load(x + i), target);
    if (hits != 0) {
      i += __builtin_ctz(hits);
      break;
    }
  }
  while (i < n && !(x[i] == largest)) ++i;
  *index = i < n ? static_cast<int32_t>(i) : 0;  // no element equals -inf or a number: all are NaN
  *value = x[*index];
}

double sum_exp(const float* x, float largest, int64_t n) {
  const Vec m = set(largest);
  DoubleSums sums = double_zero();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sums = double_add(sums, exp(sub(load(x + i), m)));
  if (i < n) {
    const Vec e = exp(sub(load_part(x + i, n - i), m));
    sums = double_add(sums, select(range_mask(0, 0, static_cast<int>(n - i)), e, zero()));
  }
  return double_reduce(sums);
}

constexpr double kDoubleRoundMagic = 6755399441055744.0;  // 1.5 * 2^52

/// 2^x in double for x in [-1000, 0]: polynomial of degree 11 on [-0.5, 0.5] (2e-17 relative,
/// exactly 1 at 0), its even and odd powers as two chains. Adding the magic number leaves round(x)
/// in the low mantissa bits. Outside the range the result has no meaning.
inline DoubleVec exp2(DoubleVec x) {
  const DoubleVec shifted = add(x, set_double(kDoubleRoundMagic));
  const DoubleVec f = sub(x, sub(shifted, set_double(kDoubleRoundMagic)));
  const DoubleVec f2 = mul(f, f);
  DoubleVec odd = set_double(0x1.e9d3fe3952179p-32);
  DoubleVec even = set_double(0x1.e6063f7217bc6p-28);
  odd = fma(odd, f2, set_double(0x1.b524fae627834p-24));
  even = fma(even, f2, set_double(0x1.62bfd47773353p-20));
  odd = fma(odd, f2, set_double(0x1.ffcbfc670dcd4p-17));
  even = fma(even, f2, set_double(0x1.430913096fd9fp-13));
  odd = fma(odd, f2, set_double(0x1.5d87fe78a5276p-10));
  even = fma(even, f2, set_double(0x1.3b2ab6fba1ddap-7));
  odd = fma(odd, f2, set_double(0x1.c6b08d704a0c2p-5));
  even = fma(even, f2, set_double(0x1.ebfbdff82c598p-3));
  odd = fma(odd, f2, set_double(0x1.62e42fefa39efp-1));
  even = fma(even, f2, set_double(1.0));
  return add_low_bits_to_exponent(fma(odd, f, even), shifted);
}

double sampling_weights(const float* x, int64_t n, double largest, double rate, float cut,
                        double* weights) {
  const DoubleVec top = set_double(largest), factor = set_double(rate);
  const DoubleVec least = set_double(static_cast<double>(cut));
  const auto weigh = [top, factor, least](DoubleVec v) {
    return zero_if_less(v, least, exp2(mul(sub(v, top), factor)));
  };
  DoubleVec sum0 = set_double(0), sum1 = set_double(0);
  const auto step = [&](const float* from, double* to) {
    const DoubleVec low = weigh(load_widened(from)), high = weigh(load_widened(from + kLanes / 2));
    store(to, low);
    store(to + kLanes / 2, high);
    sum0 = add(sum0, low);
    sum1 = add(sum1, high);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) step(x + i, weights + i);
  if (i < n) {
    alignas(64) float part[kLanes];
    alignas(64) double result[kLanes];
    for (int j = 0; j < kLanes; ++j) part[j] = i + j < n ? x[i + j] : -__builtin_inff();
    step(part, result);
    for (int j = 0; i + j < n; ++j) weights[i + j] = result[j];
  }
  return reduce_add(add(sum0, sum1));
}

/// Writes one token's K column and V row of a bfloat16 sub-page, rounded to nearest even.
inline void write_bf16(uint8_t* page, int slot, int head_dim, const float* k, const float* v) {
  alignas(64) uint16_t rounded[kMaxHeadDim];
  to_bf16(k, rounded, head_dim);
  uint16_t* key = bf16_keys(page) + slot * 2;  // [head_dim / 2][16 tokens][2]
  for (int i = 0; i < head_dim / 2; ++i) {
    key[i * 2 * kSubPage] = rounded[2 * i];
    key[i * 2 * kSubPage + 1] = rounded[2 * i + 1];
  }
  uint16_t* value = bf16_values(page, head_dim) + (slot / 2) * 2 * head_dim;  // [pair][head_dim][2]
  for (int d = 0; d < head_dim; d += kLanes) {
    const IntVec even_or_odd = round_bf16(load(v + d));
    uint16_t* pair = value + 2 * d;
    store_pairs(pair, slot % 2 == 0 ? even_or_odd
                                    : or_high16(keep_bits(load_pairs(pair), 0xffffu), even_or_odd));
  }
}

/// Codes of one row by the rule in params.h; returns the scale.
inline float quantize_row(const float* x, int n, int8_t* codes) {
  const CodeScale s = code_scale(x, n, 127.f);
  const Vec inverse = set(s.inverse);
  for (int i = 0; i < n; i += kLanes) {
    store_low8(codes + i, round_to_int(mul(load(x + i), inverse)));
  }
  return s.scale;
}

void kv_write(const KvWriteParams& p) {
  const int head_dim = p.kv.head_dim;
  alignas(64) int8_t k_codes[kMaxHeadDim], v_codes[kMaxHeadDim];
  for (int t = 0; t < p.num_tokens; ++t) {
    const int position = p.first_position + t, slot = position % kSubPage;
    uint8_t* page = sub_page(p.kv, p.block_table, p.kv_head, position);
    const float* k = p.k + t * p.stride;
    const float* v = p.v + t * p.stride;
    if (p.kv.dtype == KvDtype::kBF16) {
      write_bf16(page, slot, head_dim, k, v);
      continue;
    }
    const float k_scale = quantize_row(k, head_dim, k_codes);
    const float v_scale = quantize_row(v, head_dim, v_codes);
    store_codes(page, slot, head_dim, k_codes, k_scale, v_codes, v_scale);
  }
}

inline void fill_elementwise(KernelTable& table) {
  table.rms_norm = rms_norm;
  table.add = add_arrays;
  table.scale = scale;
  table.rope = rope;
  table.silu_mul = silu_mul;
  table.gelu_tanh_mul = gelu_tanh_mul;
  table.softcap = softcap;
  table.layer_norm = layer_norm;
  table.bias_gelu = bias_gelu;
  table.softmax = softmax;
  table.kv_write = kv_write;
  table.argmax = argmax;
  table.sum_exp = sum_exp;
  table.sampling_weights = sampling_weights;
}

}  // namespace
}  // namespace sagellm::kernels
