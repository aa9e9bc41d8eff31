// Matmul in portable C++: the reference that the vector kernels equal bit for bit.
#include <cstddef>
#include <cstdint>

#include "sagellm/kernels/cpu/isa_tables.h"
#include "sagellm/kernels/cpu/mm_layout.h"

namespace sagellm::kernels {
namespace {

using F = PackedFormat;

constexpr int kTile = 8;  // tokens that share one unpacked unit

float bits_to_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }

float load_half(const uint8_t* p) {
  const uint32_t h = static_cast<uint32_t>(p[0]) | static_cast<uint32_t>(p[1]) << 8;
  const uint32_t sign = (h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 0x1fu;
  const uint32_t mantissa = h & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  if (exponent == 31) {
    const uint32_t quiet = mantissa != 0 ? 0x400000u : 0u;
    return bits_to_float(sign | 0x7f800000u | quiet | mantissa << 13);
  }
  return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

/// Code of (row, k) of a unit.
template <QuantLayout L>
int code(const uint8_t* unit, int row, int k) {
  const int group = k / 4;
  const int lane = row * 4 + k % 4;
  if constexpr (L.bits == CodeBits::k8) {
    return unit[group * 64 + lane];
  } else {
    const uint8_t nibbles = unit[group % 4 * 64 + lane];
    const int low = group < 4 ? nibbles & 15 : nibbles >> 4;
    if constexpr (L.bits == CodeBits::k5) {
      return low | (unit[256 + lane] >> group & 1) << 4;
    } else if constexpr (L.bits == CodeBits::k6) {
      return low | (unit[256 + group % 2 * 64 + lane] >> (2 * (group / 2)) & 3) << 4;
    } else {
      return low;
    }
  }
}

/// A unit ready to multiply: y += float(sum_k code * X) * (d * d_x) + m * s_x.
struct Unit {
  int32_t code[kUnit][kRowBlock];  // zero point subtracted; times the sub-scale in Q6_K
  float d[kRowBlock];
  float m[kRowBlock];
};

template <PackedFormat kFormat>
void unpack(const uint8_t* row_block, int64_t index, Unit& out) {
  constexpr QuantLayout L = quant_layout(kFormat);
  const uint8_t* group = row_block + index / L.units * L.group_bytes;
  const int64_t u = index % L.units;
  const uint8_t* unit = group + u * L.unit_bytes;
  for (int row = 0; row < kRowBlock; ++row) {
    const float d = load_half(group + L.d + 2 * row);
    const float m = L.has_min ? load_half(group + L.m + 2 * row) : 0.f;
    if constexpr (L.units == 8 && L.has_min) {
      out.d[row] = d * static_cast<float>(group[L.sub_scales + u * 16 + row]);
      out.m[row] = -(m * static_cast<float>(group[L.sub_scales + 128 + u * 16 + row]));
    } else {
      out.d[row] = d;
      out.m[row] = m;
    }
    for (int k = 0; k < kUnit; ++k) {
      int32_t value = code<L>(unit, row, k) - L.zero_point;
      if constexpr (kFormat == F::kQ6_K) {
        value *= static_cast<int8_t>(group[L.sub_scales + (2 * u + k / 16) * 16 + row]);
      }
      out.code[k][row] = value;
    }
  }
}

template <PackedFormat kFormat>
void matmul_quantized(const MatmulParams& p) {
  constexpr QuantLayout L = quant_layout(kFormat);
  const int64_t units = p.k / kUnit;
  const int64_t stride = units / L.units * L.group_bytes;
  for (int64_t rb = p.row_block_begin; rb < p.row_block_end; ++rb) {
    const uint8_t* w = static_cast<const uint8_t*>(p.weights) + rb * stride;
    for (int64_t t0 = 0; t0 < p.num_tokens; t0 += kTile) {
      const int64_t count = p.num_tokens - t0 < kTile ? p.num_tokens - t0 : kTile;
      float acc[kTile][kRowBlock] = {};
      Unit unit;
      for (int64_t u = 0; u < units; ++u) {
        unpack<kFormat>(w, u, unit);
        for (int64_t t = 0; t < count; ++t) {
          const int64_t x = (t0 + t) * p.k + u * kUnit;
          int32_t sum[kRowBlock] = {};
          for (int k = 0; k < kUnit; ++k) {
            const int32_t value =
                p.x.q_lo != nullptr ? 128 * p.x.q[x + k] + p.x.q_lo[x + k] : p.x.q[x + k];
            for (int r = 0; r < kRowBlock; ++r) sum[r] += unit.code[k][r] * value;
          }
          const float d = p.x.d[(t0 + t) * units + u];
          const float s = p.x.s[(t0 + t) * units + u];
          for (int r = 0; r < kRowBlock; ++r) {
            acc[t][r] = __builtin_fmaf(static_cast<float>(sum[r]), unit.d[r] * d, acc[t][r]);
            if constexpr (L.has_min) acc[t][r] = __builtin_fmaf(unit.m[r], s, acc[t][r]);
          }
        }
      }
      for (int64_t t = 0; t < count; ++t) {
        float* out = p.out + (t0 + t) * p.out_stride + rb * kRowBlock;
        for (int r = 0; r < kRowBlock; ++r) out[r] = acc[t][r];
      }
    }
  }
}

template <PackedFormat kFormat>
float load_weight(const uint8_t* row_block, int64_t k, int row) {
  if constexpr (kFormat == F::kF32) {
    float value;
    __builtin_memcpy(&value, row_block + (k * kRowBlock + row) * 4, 4);
    return value;
  } else if constexpr (kFormat == F::kF16) {
    return load_half(row_block + (k * kRowBlock + row) * 2);
  } else {
    const uint8_t* p = row_block + k / 2 * 64 + row * 4 + k % 2 * 2;
    return bits_to_float(static_cast<uint32_t>(p[0]) << 16 | static_cast<uint32_t>(p[1]) << 24);
  }
}

template <PackedFormat kFormat>
void matmul_float(const MatmulParams& p) {
  constexpr int kBytes2 = kFormat == F::kF32 ? 128 : 64;  // bytes of two k
  const int64_t stride = kFormat == F::kBF16 ? (p.k + 1) / 2 * kBytes2 : p.k * kBytes2 / 2;
  for (int64_t rb = p.row_block_begin; rb < p.row_block_end; ++rb) {
    const uint8_t* w = static_cast<const uint8_t*>(p.weights) + rb * stride;
    for (int64_t t0 = 0; t0 < p.num_tokens; t0 += kTile) {
      const int64_t count = p.num_tokens - t0 < kTile ? p.num_tokens - t0 : kTile;
      float acc[kTile][kRowBlock] = {};
      for (int64_t k = 0; k < p.k; ++k) {
        for (int r = 0; r < kRowBlock; ++r) {
          const float weight = load_weight<kFormat>(w, k, r);
          for (int64_t t = 0; t < count; ++t) {
            acc[t][r] = __builtin_fmaf(weight, p.x.f32[(t0 + t) * p.k + k], acc[t][r]);
          }
        }
      }
      for (int64_t t = 0; t < count; ++t) {
        float* out = p.out + (t0 + t) * p.out_stride + rb * kRowBlock;
        for (int r = 0; r < kRowBlock; ++r) out[r] = acc[t][r];
      }
    }
  }
}

/// A chain over the group with codes as halves, which are 256 times too small, then its scale.
void matmul_f8(const MatmulParams& p) {
  const int64_t stride = (p.k + kF8Group - 1) / kF8Group * 64 + p.k * kRowBlock;
  for (int64_t rb = p.row_block_begin; rb < p.row_block_end; ++rb) {
    for (int64_t t0 = 0; t0 < p.num_tokens; t0 += kTile) {
      const int64_t count = p.num_tokens - t0 < kTile ? p.num_tokens - t0 : kTile;
      const uint8_t* w = static_cast<const uint8_t*>(p.weights) + rb * stride;
      float acc[kTile][kRowBlock] = {};
      for (int64_t begin = 0; begin < p.k; begin += kF8Group) {
        const int64_t end = p.k - begin < kF8Group ? p.k : begin + kF8Group;
        float scale[kRowBlock];
        __builtin_memcpy(scale, w, sizeof(scale));
        w += sizeof(scale);
        float sum[kTile][kRowBlock] = {};
        for (int64_t k = begin; k < end; ++k, w += kRowBlock) {
          for (int r = 0; r < kRowBlock; ++r) {
            const uint8_t half[2] = {static_cast<uint8_t>(w[r] << 7),
                                     static_cast<uint8_t>((w[r] & 0x80) | (w[r] >> 1 & 0x3f))};
            const float weight = load_half(half);
            for (int64_t t = 0; t < count; ++t) {
              sum[t][r] = __builtin_fmaf(weight, p.x.f32[(t0 + t) * p.k + k], sum[t][r]);
            }
          }
        }
        for (int64_t t = 0; t < count; ++t) {
          for (int r = 0; r < kRowBlock; ++r) {
            acc[t][r] = __builtin_fmaf(sum[t][r], scale[r] * 256.f, acc[t][r]);
          }
        }
      }
      for (int64_t t = 0; t < count; ++t) {
        float* out = p.out + (t0 + t) * p.out_stride + rb * kRowBlock;
        for (int r = 0; r < kRowBlock; ++r) out[r] = acc[t][r];
      }
    }
  }
}

void matmul(const MatmulParams& p) {
  switch (p.format) {
    case F::kF32:
      return matmul_float<F::kF32>(p);
    case F::kF16:
      return matmul_float<F::kF16>(p);
    case F::kBF16:
      return matmul_float<F::kBF16>(p);
    case F::kF8:
      return matmul_f8(p);
    case F::kQ4_0:
      return matmul_quantized<F::kQ4_0>(p);
    case F::kQ4_1:
      return matmul_quantized<F::kQ4_1>(p);
    case F::kQ5_0:
      return matmul_quantized<F::kQ5_0>(p);
    case F::kQ5_1:
      return matmul_quantized<F::kQ5_1>(p);
    case F::kQ8_0:
      return matmul_quantized<F::kQ8_0>(p);
    case F::kQ4_K:
      return matmul_quantized<F::kQ4_K>(p);
    case F::kQ5_K:
      return matmul_quantized<F::kQ5_K>(p);
    case F::kQ6_K:
      return matmul_quantized<F::kQ6_K>(p);
  }
}

}  // namespace

void fill_matmul_generic(KernelTable& table) {
  for (int i = 0; i < kNumPackedFormats; ++i) {
    const bool is_float = i <= static_cast<int>(F::kF8);
    table.act_kind[i] = is_float ? ActKind::kF32 : ActKind::kI8;
  }
  table.matmul = matmul;
  fill_quantize_generic(table);
}

}  // namespace sagellm::kernels
