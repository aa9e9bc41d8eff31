// Element-wise kernels in plain C++: the specification of the SIMD ones, and the only ones on other
// machines.
#include "../kv_page.h"
#include "attention.h"
#include "sagellm/kernels/cpu/isa_tables.h"
#include "sagellm/kernels/params.h"
#include "scalar_math.h"

namespace sagellm::kernels {
namespace {

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
  constexpr int kSums =
      8;  // a fixed number of partial sums, so that the loop vectorises in a defined order
  float sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int j = 0; j < kSums; ++j) sums[j] += x[i + j] * x[i + j];
  }
  for (int j = 0; i + j < n; ++j) sums[j] += x[i + j] * x[i + j];
  const float total =
      ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
  const float factor = 1.f / __builtin_sqrtf(total / static_cast<float>(n) + eps);
  for (i = 0; i < n; ++i) out[i] = x[i] * factor * weight[i];
}

void add_arrays(const float* a, const float* b, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] + b[i];
}

void scale(float* x, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

void rope(float* x, const float* cos, const float* sin, int64_t rot) {
  const int64_t half = rot / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    x[i] = a * cos[i] - b * sin[i];
    x[half + i] = b * cos[i] + a * sin[i];
  }
}

void silu_mul(const float* gate_in, const float* up, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = silu(gate_in[i]) * up[i];
}

void gelu_tanh_mul(const float* gate_in, const float* up, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = gelu_tanh(gate_in[i]) * up[i];
}

void softcap(float* x, float cap, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = cap * tanh(x[i] / cap);
}

/// Sum of fn(i) over i < n, in an order fixed by n.
template <class Fn>
float sum_of(int64_t n, Fn fn) {
  constexpr int kSums = 8;
  float sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int j = 0; j < kSums; ++j) sums[j] += fn(i + j);
  }
  for (int j = 0; i + j < n; ++j) sums[j] += fn(i + j);
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t n,
                float* out) {
  const auto count = static_cast<float>(n);
  const float mean = sum_of(n, [x](int64_t i) { return x[i]; }) / count;
  const auto squared = [x, mean](int64_t i) { return (x[i] - mean) * (x[i] - mean); };
  const float factor = 1.f / __builtin_sqrtf(sum_of(n, squared) / count + eps);
  for (int64_t i = 0; i < n; ++i) out[i] = (x[i] - mean) * factor * weight[i] + bias[i];
}

void bias_gelu(const float* x, const float* bias, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = gelu_erf(x[i] + bias[i]);
}

void softmax(float* x, int64_t n) {
  float largest = x[0];
  for (int64_t i = 1; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  for (int64_t i = 0; i < n; ++i) x[i] = exp(x[i] - largest);
  scale(x, 1.f / sum_of(n, [x](int64_t i) { return x[i]; }), n);
}

void write_bf16(uint8_t* page, int slot, int head_dim, const float* k, const float* v) {
  uint16_t* key = bf16_keys(page);
  for (int d = 0; d < head_dim; ++d) {
    key[(d / 2) * 2 * kSubPage + slot * 2 + d % 2] = float_to_bf16(k[d]);
  }
  uint16_t* value = bf16_values(page, head_dim) + (slot / 2) * 2 * head_dim;
  for (int d = 0; d < head_dim; ++d) {
    value[2 * d + slot % 2] = float_to_bf16(v[d]);
    if (slot % 2 == 0) value[2 * d + 1] = 0;
  }
}

/// Codes of one row by the rule in params.h; returns the scale.
float quantize_row(const float* x, int n, int8_t* codes) {
  float largest = 0.f, poison = 0.f;  // poison: 0, or NaN when a value is not finite
  for (int i = 0; i < n; ++i) {
    const float a = __builtin_fabsf(x[i]);
    largest = a > largest ? a : largest;
    poison += a * 0.f;
  }
  if (poison != 0.f || largest < kMinCodedMagnitude) {
    for (int i = 0; i < n; ++i) codes[i] = 0;
    return poison != 0.f ? __builtin_nanf("") : 0.f;
  }
  const float inverse = 127.f / largest;
  for (int i = 0; i < n; ++i) {
    codes[i] = static_cast<int8_t>(float_bits(x[i] * inverse + kRoundMagic));
  }
  return largest / 127.f;
}

void kv_write(const KvWriteParams& p) {
  const int head_dim = p.kv.head_dim;
  int8_t k_codes[kMaxHeadDim], v_codes[kMaxHeadDim];
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

void argmax(const float* x, int64_t n, float* value, int32_t* index) {
  int64_t best = -1;
  for (int64_t i = 0; i < n; ++i) {
    if (x[i] == x[i] && (best < 0 || x[i] > x[best])) best = i;
  }
  *index = best < 0 ? 0 : static_cast<int32_t>(best);
  *value = x[*index];
}

double sum_exp(const float* x, float largest, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(exp(x[i] - largest));
  return sum;
}

double sampling_weights(const float* x, int64_t n, double largest, double rate, float cut,
                        double* weights) {
  for (int64_t i = 0; i < n; ++i) {
    const double weight = exp2((static_cast<double>(x[i]) - largest) * rate);
    weights[i] = x[i] >= cut ? weight : 0.0;
  }
  constexpr int kSums = 8;
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int j = 0; j < kSums; ++j) sums[j] += weights[i + j];
  }
  for (int j = 0; i + j < n; ++j) sums[j] += weights[i + j];
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

}  // namespace

void fill_ops_generic(KernelTable& table) {
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
  fill_attention_generic(table);
}

}  // namespace sagellm::kernels
