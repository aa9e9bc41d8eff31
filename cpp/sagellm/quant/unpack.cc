#include "sagellm/quant/unpack.h"

#include <algorithm>
#include <cstring>

#include "sagellm/base/dtype.h"
#include "sagellm/base/error.h"
#include "sagellm/quant/formats.h"
#include "sagellm/quant/packed_unit.h"

namespace sagellm::quant {

using kernels::PackedFormat;

namespace {

inline float half_at(const uint8_t* p) { return f16_to_f32(load16(p)); }

/// 32 four-bit codes of row `r` of a unit.
void get_nibbles(const uint8_t* nib, int r, uint8_t q[kBlock]) {
  for (int l = 0; l < 16; ++l) {
    const uint8_t byte = nib[l / 4 * 64 + 4 * r + l % 4];
    q[l] = byte & 15;
    q[16 + l] = byte >> 4;
  }
}

/// Adds bit 4 of each code.
void get_high(const uint8_t* high, int r, uint8_t q[kBlock]) {
  for (int l = 0; l < kBlock; ++l) {
    const int bit = (high[4 * r + l % 4] >> (l / 4)) & 1;
    q[l] = static_cast<uint8_t>(q[l] | (bit << 4));
  }
}

/// Adds bits 4..5 of each code.
void get_two(const uint8_t* two, int r, uint8_t q[kBlock]) {
  for (int l = 0; l < kBlock; ++l) {
    const int j = l / 4;
    const int bits = (two[(j & 1) * 64 + 4 * r + l % 4] >> (2 * (j >> 1))) & 3;
    q[l] = static_cast<uint8_t>(q[l] | (bits << 4));
  }
}

/// kQ4_0 .. kQ5_1: d * (q - kZero) or d * q + m.
template <bool kHigh, bool kMin, int kZero>
void unpack_small(const uint8_t* in, int64_t k, int r, float* out) {
  for (int64_t b = 0; b < k / kBlock; ++b, out += kBlock) {
    uint8_t q[kBlock];
    get_nibbles(in, r, q);
    in += kNibbleBytes;
    if constexpr (kHigh) {
      get_high(in, r, q);
      in += kHighBytes;
    }
    const float d = half_at(in + 2 * r);
    in += 2 * kRows;
    if constexpr (kMin) {
      const float m = half_at(in + 2 * r);
      in += 2 * kRows;
      for (int l = 0; l < kBlock; ++l) out[l] = d * static_cast<float>(q[l]) + m;
    } else {
      for (int l = 0; l < kBlock; ++l) out[l] = d * static_cast<float>(q[l] - kZero);
    }
  }
}

void unpack_q8_0(const uint8_t* in, int64_t k, int r, float* out) {
  for (int64_t b = 0; b < k / kBlock; ++b, out += kBlock) {
    const float d = half_at(in + 64 * kUnitDwords + 2 * r);
    for (int l = 0; l < kBlock; ++l)
      out[l] = d * static_cast<float>(in[l / 4 * 64 + 4 * r + l % 4] - 128);
    in += 64 * kUnitDwords + 2 * kRows;
  }
}

void unpack_f8(const uint8_t* in, int64_t k, int r, float* out) {
  for (int64_t begin = 0; begin < k; begin += kernels::kF8Group) {
    float scale = 0.f;
    std::memcpy(&scale, in + 4 * r, 4);
    in += 4 * kRows;
    const int64_t end = std::min(begin + kernels::kF8Group, k);
    for (int64_t i = begin; i < end; ++i, in += kRows) out[i] = scale * e4m3_to_f32(in[r]);
  }
}

template <bool kHigh>
void unpack_scaled_min(const uint8_t* in, int64_t k, int r, float* out) {
  constexpr int kUnitBytes = kNibbleBytes + (kHigh ? kHighBytes : 0);
  for (int64_t b = 0; b < k / kSuperblock; ++b) {
    const uint8_t* scales = in + kUnits * kUnitBytes;
    const uint8_t* halves = scales + 2 * kUnits * kRows;
    const float d = half_at(halves + 2 * r);
    const float dmin = half_at(halves + 2 * kRows + 2 * r);
    for (int u = 0; u < kUnits; ++u, in += kUnitBytes, out += kBlock) {
      uint8_t q[kBlock];
      get_nibbles(in, r, q);
      if constexpr (kHigh) get_high(in + kNibbleBytes, r, q);
      const float dl = d * static_cast<float>(scales[u * kRows + r]);
      const float ml = dmin * static_cast<float>(scales[(kUnits + u) * kRows + r]);
      for (int l = 0; l < kBlock; ++l) out[l] = dl * static_cast<float>(q[l]) - ml;
    }
    in = halves + 4 * kRows;
  }
}

void unpack_q6_k(const uint8_t* in, int64_t k, int r, float* out) {
  constexpr int kUnitBytes = kNibbleBytes + kTwoBytes;
  for (int64_t b = 0; b < k / kSuperblock; ++b) {
    const uint8_t* scales = in + kUnits * kUnitBytes;
    const uint8_t* halves = scales + 16 * kRows;
    const float d = half_at(halves + 2 * r);
    for (int u = 0; u < kUnits; ++u, in += kUnitBytes, out += kBlock) {
      uint8_t q[kBlock];
      get_nibbles(in, r, q);
      get_two(in + kNibbleBytes, r, q);
      for (int l = 0; l < kBlock; ++l) {
        const float dl =
            d * static_cast<float>(static_cast<int8_t>(scales[(2 * u + l / 16) * kRows + r]));
        out[l] = dl * static_cast<float>(q[l] - 32);
      }
    }
    in = halves + 2 * kRows;
  }
}

}  // namespace

void unpack_row(const PackedMatrix& matrix, int64_t row, float* out) {
  require<InvalidArgument>(row >= 0 && row < matrix.n, "row ", row, " of a matrix of ", matrix.n,
                           " rows");
  const uint8_t* in = matrix.row_block(row / kRows);
  const int r = static_cast<int>(row % kRows);
  const int64_t k = matrix.k;
  switch (matrix.format) {
    case PackedFormat::kF32:
      for (int64_t i = 0; i < k; ++i) std::memcpy(out + i, in + (i * kRows + r) * 4, 4);
      return;
    case PackedFormat::kF16:
      for (int64_t i = 0; i < k; ++i) out[i] = half_at(in + (i * kRows + r) * 2);
      return;
    case PackedFormat::kBF16:
      for (int64_t i = 0; i < k; ++i)
        out[i] = bf16_to_f32(load16(in + ((i / 2 * kRows + r) * 2 + i % 2) * 2));
      return;
    case PackedFormat::kF8:
      return unpack_f8(in, k, r, out);
    case PackedFormat::kQ4_0:
      return unpack_small<false, false, 8>(in, k, r, out);
    case PackedFormat::kQ4_1:
      return unpack_small<false, true, 0>(in, k, r, out);
    case PackedFormat::kQ5_0:
      return unpack_small<true, false, 16>(in, k, r, out);
    case PackedFormat::kQ5_1:
      return unpack_small<true, true, 0>(in, k, r, out);
    case PackedFormat::kQ8_0:
      return unpack_q8_0(in, k, r, out);
    case PackedFormat::kQ4_K:
      return unpack_scaled_min<false>(in, k, r, out);
    case PackedFormat::kQ5_K:
      return unpack_scaled_min<true>(in, k, r, out);
    case PackedFormat::kQ6_K:
      return unpack_q6_k(in, k, r, out);
  }
}

}  // namespace sagellm::quant
