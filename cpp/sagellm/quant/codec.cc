#include "sagellm/quant/codec.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "sagellm/base/error.h"
#include "sagellm/quant/formats.h"

namespace sagellm::quant {

namespace {

// ---- f32 from blocks ----------------------------------------------------------------------------

void dequantize(const BlockQ4_0& b, float* y) {
  const float d = f16_to_f32(b.d);
  for (int i = 0; i < 16; ++i) {
    y[i] = d * static_cast<float>((b.qs[i] & 15) - 8);
    y[16 + i] = d * static_cast<float>((b.qs[i] >> 4) - 8);
  }
}

void dequantize(const BlockQ4_1& b, float* y) {
  const float d = f16_to_f32(b.d);
  const float m = f16_to_f32(b.m);
  for (int i = 0; i < 16; ++i) {
    y[i] = d * static_cast<float>(b.qs[i] & 15) + m;
    y[16 + i] = d * static_cast<float>(b.qs[i] >> 4) + m;
  }
}

/// Five-bit codes of a Q5_0 or Q5_1 block.
void codes_q5(const uint8_t* qs, uint32_t qh, uint8_t* q) {
  for (int i = 0; i < 16; ++i) {
    q[i] = static_cast<uint8_t>((qs[i] & 15) | (((qh >> i) & 1) << 4));
    q[16 + i] = static_cast<uint8_t>((qs[i] >> 4) | (((qh >> (16 + i)) & 1) << 4));
  }
}

void dequantize(const BlockQ5_0& b, float* y) {
  const float d = f16_to_f32(b.d);
  uint8_t q[kBlock];
  codes_q5(b.qs, b.qh, q);
  for (int i = 0; i < kBlock; ++i) y[i] = d * static_cast<float>(q[i] - 16);
}

void dequantize(const BlockQ5_1& b, float* y) {
  const float d = f16_to_f32(b.d);
  const float m = f16_to_f32(b.m);
  uint8_t q[kBlock];
  codes_q5(b.qs, b.qh, q);
  for (int i = 0; i < kBlock; ++i) y[i] = d * static_cast<float>(q[i]) + m;
}

void dequantize(const BlockQ8_0& b, float* y) {
  const float d = f16_to_f32(b.d);
  for (int i = 0; i < kBlock; ++i) y[i] = d * static_cast<float>(b.qs[i]);
}

void dequantize(const BlockIQ4_NL& b, float* y) {
  const float d = f16_to_f32(b.d);
  for (int i = 0; i < 16; ++i) {
    y[i] = d * static_cast<float>(kIq4NlCodebook[b.qs[i] & 15]);
    y[16 + i] = d * static_cast<float>(kIq4NlCodebook[b.qs[i] >> 4]);
  }
}

void dequantize(const BlockQ2_K& b, float* y) {
  const float d = f16_to_f32(b.d);
  const float dmin = f16_to_f32(b.dmin);
  for (int k = 0; k < kSuperblock; ++k) {
    const uint8_t scale = b.scales[k / 16];
    const float dl = d * static_cast<float>(scale & 15);
    const float ml = dmin * static_cast<float>(scale >> 4);
    const int q = (b.qs[k / 128 * 32 + k % 32] >> (2 * (k / 32 % 4))) & 3;
    y[k] = dl * static_cast<float>(q) - ml;
  }
}

void dequantize(const BlockQ3_K& b, float* y) {
  const float d = f16_to_f32(b.d);
  int8_t sc[16];
  unpack_scales_q3(b.scales, sc);
  for (int k = 0; k < kSuperblock; ++k) {
    const float dl = d * static_cast<float>(sc[k / 16]);
    const int low = (b.qs[k / 128 * 32 + k % 32] >> (2 * (k / 32 % 4))) & 3;
    const int high = (b.hmask[k % 32] >> (k / 32)) & 1;
    y[k] = dl * static_cast<float>(low + 4 * high - 4);
  }
}

void dequantize(const BlockQ4_K& b, float* y) {
  const float d = f16_to_f32(b.d);
  const float dmin = f16_to_f32(b.dmin);
  uint8_t sc[8];
  uint8_t mn[8];
  unpack_scales_k4(b.scales, sc, mn);
  for (int u = 0; u < 8; ++u) {
    const float dl = d * static_cast<float>(sc[u]);
    const float ml = dmin * static_cast<float>(mn[u]);
    const uint8_t* qs = b.qs + u / 2 * 32;
    for (int l = 0; l < 32; ++l)
      y[32 * u + l] = dl * static_cast<float>((qs[l] >> (4 * (u & 1))) & 15) - ml;
  }
}

void dequantize(const BlockQ5_K& b, float* y) {
  const float d = f16_to_f32(b.d);
  const float dmin = f16_to_f32(b.dmin);
  uint8_t sc[8];
  uint8_t mn[8];
  unpack_scales_k4(b.scales, sc, mn);
  for (int u = 0; u < 8; ++u) {
    const float dl = d * static_cast<float>(sc[u]);
    const float ml = dmin * static_cast<float>(mn[u]);
    const uint8_t* qs = b.qs + u / 2 * 32;
    for (int l = 0; l < 32; ++l) {
      const int q = ((qs[l] >> (4 * (u & 1))) & 15) | (((b.qh[l] >> u) & 1) << 4);
      y[32 * u + l] = dl * static_cast<float>(q) - ml;
    }
  }
}

void dequantize(const BlockQ6_K& b, float* y) {
  const float d = f16_to_f32(b.d);
  for (int u = 0; u < 8; ++u) {
    const int s = u % 4;
    const uint8_t* ql = b.ql + u / 4 * 64 + (s & 1) * 32;
    const uint8_t* qh = b.qh + u / 4 * 32;
    for (int l = 0; l < 32; ++l) {
      const float dl = d * static_cast<float>(b.scales[2 * u + l / 16]);
      const int q = ((ql[l] >> (4 * (s >> 1))) & 15) | (((qh[l] >> (2 * s)) & 3) << 4);
      y[32 * u + l] = dl * static_cast<float>(q - 32);
    }
  }
}

void dequantize_e4m3(const void* src, float* dst, int64_t n) {
  const auto* codes = static_cast<const uint8_t*>(src);
  for (int64_t i = 0; i < n; ++i) dst[i] = e4m3_to_f32(codes[i]);
}

template <typename Block, int kElements>
void dequantize_blocks(const void* src, float* dst, int64_t n) {
  const auto* blocks = static_cast<const Block*>(src);
  for (int64_t i = 0; i < n / kElements; ++i) dequantize(blocks[i], dst + i * kElements);
}

void dequantize_halves(const void* src, float* dst, int64_t n, float (*widen)(uint16_t)) {
  const auto* bytes = static_cast<const uint8_t*>(src);
  for (int64_t i = 0; i < n; ++i) {
    uint16_t bits = 0;
    std::memcpy(&bits, bytes + 2 * i, 2);
    dst[i] = widen(bits);
  }
}

// ---- blocks from f32 ----------------------------------------------------------------------------

/// Truncates to a code in [0, top]; NaN gives 0.
uint8_t to_code(float value, float top) {
  return value >= 0.f ? static_cast<uint8_t>(std::min(value, top)) : uint8_t{0};
}

float inverse(float d) { return d == 0.f ? 0.f : 1.f / d; }

/// The element of largest magnitude, with its sign; the first one of equals.
float extreme(const float* x) {
  float best = x[0];
  for (int i = 1; i < kBlock; ++i) {
    if (std::fabs(x[i]) > std::fabs(best)) best = x[i];
  }
  return best;
}

void put_nibbles(const uint8_t* q, uint8_t* qs) {
  for (int i = 0; i < 16; ++i) qs[i] = static_cast<uint8_t>((q[i] & 15) | ((q[16 + i] & 15) << 4));
}

uint32_t fifth_bits(const uint8_t* q) {
  uint32_t bits = 0;
  for (int i = 0; i < kBlock; ++i) bits |= static_cast<uint32_t>(q[i] >> 4) << i;
  return bits;
}

/// Symmetric codes: the extreme element takes code 0. Returns d.
float quantize_symmetric(const float* x, int levels, uint8_t* q) {
  const float half = static_cast<float>(levels) / 2.f;
  const float d = extreme(x) / -half;
  const float id = inverse(d);
  for (int i = 0; i < kBlock; ++i)
    q[i] = to_code(x[i] * id + (half + 0.5f), static_cast<float>(levels - 1));
  return d;
}

/// Codes over [min, max]; `*m` is min. Returns d.
float quantize_range(const float* x, int levels, uint8_t* q, float* m) {
  const auto [low, high] = std::minmax_element(x, x + kBlock);
  const float top = static_cast<float>(levels - 1);
  const float d = (*high - *low) / top;
  const float id = inverse(d);
  for (int i = 0; i < kBlock; ++i) q[i] = to_code((x[i] - *low) * id + 0.5f, top);
  *m = *low;
  return d;
}

void quantize(const float* x, BlockQ4_0& b) {
  uint8_t q[kBlock];
  b.d = f32_to_f16(quantize_symmetric(x, 16, q));
  put_nibbles(q, b.qs);
}

void quantize(const float* x, BlockQ4_1& b) {
  uint8_t q[kBlock];
  float m = 0.f;
  b.d = f32_to_f16(quantize_range(x, 16, q, &m));
  b.m = f32_to_f16(m);
  put_nibbles(q, b.qs);
}

void quantize(const float* x, BlockQ5_0& b) {
  uint8_t q[kBlock];
  b.d = f32_to_f16(quantize_symmetric(x, 32, q));
  b.qh = fifth_bits(q);
  put_nibbles(q, b.qs);
}

void quantize(const float* x, BlockQ5_1& b) {
  uint8_t q[kBlock];
  float m = 0.f;
  b.d = f32_to_f16(quantize_range(x, 32, q, &m));
  b.m = f32_to_f16(m);
  b.qh = fifth_bits(q);
  put_nibbles(q, b.qs);
}

void quantize(const float* x, BlockQ8_0& b) {
  const float d = std::fabs(extreme(x)) / 127.f;
  const float id = inverse(d);
  b.d = f32_to_f16(d);
  for (int i = 0; i < kBlock; ++i) {
    const float r = std::round(x[i] * id);
    b.qs[i] = std::isnan(r) ? int8_t{-127} : static_cast<int8_t>(std::clamp(r, -127.f, 127.f));
  }
}

template <typename Block>
void quantize_blocks(const float* src, void* dst, int64_t n) {
  auto* blocks = static_cast<Block*>(dst);
  for (int64_t i = 0; i < n / kBlock; ++i) quantize(src + i * kBlock, blocks[i]);
}

void quantize_halves(const float* src, void* dst, int64_t n, uint16_t (*narrow)(float)) {
  auto* bytes = static_cast<uint8_t*>(dst);
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t bits = narrow(src[i]);
    std::memcpy(bytes + 2 * i, &bits, 2);
  }
}

}  // namespace

void dequantize_row(Format format, const void* src, float* dst, int64_t n) {
  const auto bytes = static_cast<size_t>(row_bytes(format, n));  // checks n
  if (n == 0) return;
  switch (format) {
    case Format::kF32:
      std::memcpy(dst, src, bytes);
      return;
    case Format::kF16:
      return dequantize_halves(src, dst, n, f16_to_f32);
    case Format::kBF16:
      return dequantize_halves(src, dst, n, bf16_to_f32);
    case Format::kF8_E4M3:
      return dequantize_e4m3(src, dst, n);
    case Format::kQ4_0:
      return dequantize_blocks<BlockQ4_0, kBlock>(src, dst, n);
    case Format::kQ4_1:
      return dequantize_blocks<BlockQ4_1, kBlock>(src, dst, n);
    case Format::kQ5_0:
      return dequantize_blocks<BlockQ5_0, kBlock>(src, dst, n);
    case Format::kQ5_1:
      return dequantize_blocks<BlockQ5_1, kBlock>(src, dst, n);
    case Format::kQ8_0:
      return dequantize_blocks<BlockQ8_0, kBlock>(src, dst, n);
    case Format::kQ2_K:
      return dequantize_blocks<BlockQ2_K, kSuperblock>(src, dst, n);
    case Format::kQ3_K:
      return dequantize_blocks<BlockQ3_K, kSuperblock>(src, dst, n);
    case Format::kQ4_K:
      return dequantize_blocks<BlockQ4_K, kSuperblock>(src, dst, n);
    case Format::kQ5_K:
      return dequantize_blocks<BlockQ5_K, kSuperblock>(src, dst, n);
    case Format::kQ6_K:
      return dequantize_blocks<BlockQ6_K, kSuperblock>(src, dst, n);
    case Format::kIQ4_NL:
      return dequantize_blocks<BlockIQ4_NL, kBlock>(src, dst, n);
  }
}

void quantize_row(Format format, const float* src, void* dst, int64_t n) {
  const auto bytes = static_cast<size_t>(row_bytes(format, n));  // checks n
  if (n == 0) return;
  switch (format) {
    case Format::kF32:
      std::memcpy(dst, src, bytes);
      return;
    case Format::kF16:
      return quantize_halves(src, dst, n, f32_to_f16);
    case Format::kBF16:
      return quantize_halves(src, dst, n, f32_to_bf16);
    case Format::kQ4_0:
      return quantize_blocks<BlockQ4_0>(src, dst, n);
    case Format::kQ4_1:
      return quantize_blocks<BlockQ4_1>(src, dst, n);
    case Format::kQ5_0:
      return quantize_blocks<BlockQ5_0>(src, dst, n);
    case Format::kQ5_1:
      return quantize_blocks<BlockQ5_1>(src, dst, n);
    case Format::kQ8_0:
      return quantize_blocks<BlockQ8_0>(src, dst, n);
    case Format::kF8_E4M3:
    case Format::kQ2_K:
    case Format::kQ3_K:
    case Format::kQ4_K:
    case Format::kQ5_K:
    case Format::kQ6_K:
    case Format::kIQ4_NL:
      break;
  }
  fail<Unsupported>("cannot quantize to ", format_info(format).name,
                    "; supported: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0");
}

}  // namespace sagellm::quant
