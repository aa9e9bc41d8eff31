// Checks of one KernelTable's matmul and quantize against the generic table, on random packed
// weights.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "sagellm/kernels/cpu/isa_tables.h"
#include "sagellm/kernels/cpu/mm_layout.h"
#include "sagellm/kernels/params.h"

namespace sagellm::kernels::testing {

inline const char* format_name(PackedFormat format) {
  constexpr const char* kNames[] = {"F32",  "F16",  "BF16", "F8",   "Q4_0", "Q4_1",
                                    "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"};
  return kNames[static_cast<int>(format)];
}

/// Exactly `size` elements, 64-byte aligned, so that a sanitizer sees every access past the end.
template <typename T>
class Aligned {
 public:
  explicit Aligned(size_t size)
      : bytes_(size * sizeof(T)),
        data_(static_cast<T*>(::operator new (bytes_, std::align_val_t{64}))) {
    std::memset(data_.get(), 0xff, bytes_);
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  size_t bytes() const { return bytes_; }
  T& operator[](size_t i) { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete (p, std::align_val_t{64}); }
  };
  size_t bytes_;
  std::unique_ptr<T, Free> data_;
};

/// A finite half of either sign, now and then zero or subnormal.
inline uint16_t random_half(std::mt19937& rng) {
  const uint32_t exponent = rng() % 14;
  return static_cast<uint16_t>((rng() & 0x83ffu) | exponent << 10);
}

/// Random bytes are valid codes of every format; only floats need care.
inline Aligned<uint8_t> random_weights(PackedFormat format, int64_t k, int64_t row_blocks,
                                       std::mt19937& rng) {
  Aligned<uint8_t> w(packed_row_block_bytes(format, k) * static_cast<size_t>(row_blocks));
  const auto halves = [&](size_t at, int count) {
    for (int i = 0; i < count; ++i) {
      const uint16_t h = random_half(rng);
      std::memcpy(w.data() + at + 2 * static_cast<size_t>(i), &h, 2);
    }
  };
  if (format == PackedFormat::kF16) {
    halves(0, static_cast<int>(w.bytes() / 2));
  } else if (format == PackedFormat::kF32 || format == PackedFormat::kBF16) {
    const size_t step = format == PackedFormat::kF32 ? 4 : 2;
    for (size_t i = 0; i < w.bytes(); i += step) {
      const float value = static_cast<float>(rng()) / 2e9f - 1.f;
      const auto* bytes = reinterpret_cast<const uint8_t*>(&value);
      std::memcpy(w.data() + i, bytes + 4 - step, step);
    }
  } else if (format == PackedFormat::kF8) {
    for (size_t i = 0; i < w.bytes(); ++i) w[i] = static_cast<uint8_t>(rng());
    const size_t stride = packed_row_block_bytes(format, k);
    for (size_t at = 0; at < w.bytes(); ++at) {  // scales, which begin every group of a row block
      if (at % stride % (64 + kF8Group * 16) != 0) continue;
      for (size_t r = 0; r < 16; ++r) {
        const float scale = static_cast<float>(rng()) / 2e9f - 1.f;
        std::memcpy(w.data() + at + 4 * r, &scale, 4);
      }
    }
  } else {
    const QuantLayout layout = quant_layout(format);
    for (size_t i = 0; i < w.bytes(); ++i) w[i] = static_cast<uint8_t>(rng());
    for (size_t group = 0; group < w.bytes(); group += static_cast<size_t>(layout.group_bytes)) {
      halves(group + static_cast<size_t>(layout.d), 16);
      if (layout.has_min) halves(group + static_cast<size_t>(layout.m), 16);
    }
  }
  return w;
}

/// Activations of every kind for random rows.
class TestActivations {
 public:
  TestActivations(int tokens, int64_t k, std::mt19937& rng)
      : tokens_(tokens),
        k_(k),
        f32_(size(k)),
        bf16_(size(k + k % 2)),
        q_(size(k)),
        q_lo_(size(k)),
        d_(size(k / 32)),
        s_(size(k / 32)),
        sum16_(size(k / 16)) {
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < size(k); ++i) f32_[i] = normal(rng);
    const int64_t stride = k + k % 2;
    std::memset(bf16_.data(), 0, bf16_.bytes());
    for (int t = 0; t < tokens; ++t) {
      for (int64_t i = 0; i < k; ++i) {
        uint32_t bits;
        std::memcpy(&bits, &f32_[static_cast<size_t>(t * k + i)], 4);
        bf16_[static_cast<size_t>(t * stride + i)] = static_cast<uint16_t>(bits >> 16);
      }
    }
  }

  void quantize(const KernelTable& table, bool a15) {
    a15_ = a15;
    QuantizeParams p;
    p.x = f32_.data();
    p.x_stride = p.k = k_;
    p.num_tokens = tokens_;
    p.q = q_.data();
    p.q_lo = a15 ? q_lo_.data() : nullptr;
    p.d = d_.data();
    p.s = s_.data();
    p.sum16 = sum16_.data();
    table.quantize(p);
  }

  Activations view(int64_t token) const {
    const int64_t blocks = token * (k_ / 32);
    return {f32_.data() + token * k_,  bf16_.data() + token * (k_ + k_ % 2),
            q_.data() + token * k_,    a15_ ? q_lo_.data() + token * k_ : nullptr,
            d_.data() + blocks,        s_.data() + blocks,
            sum16_.data() + 2 * blocks};
  }

  Aligned<float>& f32() { return f32_; }

  friend void expect_same_bits(const TestActivations& a, const TestActivations& b) {
    EXPECT_EQ(std::memcmp(a.q_.data(), b.q_.data(), a.q_.bytes()), 0) << "q";
    EXPECT_EQ(std::memcmp(a.q_lo_.data(), b.q_lo_.data(), a.q_lo_.bytes()), 0) << "q_lo";
    EXPECT_EQ(std::memcmp(a.d_.data(), b.d_.data(), a.d_.bytes()), 0) << "d";
    EXPECT_EQ(std::memcmp(a.sum16_.data(), b.sum16_.data(), a.sum16_.bytes()), 0) << "sum16";
    for (size_t i = 0; i < a.s_.bytes() / sizeof(float); ++i) {
      const float x = a.s_.data()[i], y = b.s_.data()[i];
      EXPECT_TRUE(x == y || (std::isnan(x) && std::isnan(y)))
          << "s[" << i << "]: " << x << " " << y;
    }
  }

 private:
  size_t size(int64_t per_token) const {
    return static_cast<size_t>(tokens_) * static_cast<size_t>(per_token);
  }

  int tokens_;
  int64_t k_;
  bool a15_ = false;
  Aligned<float> f32_;
  Aligned<uint16_t> bf16_;
  Aligned<int8_t> q_, q_lo_;
  Aligned<float> d_, s_;
  Aligned<int32_t> sum16_;
};

inline MatmulParams params(PackedFormat format, const Aligned<uint8_t>& w, int64_t k,
                           int row_blocks, int tokens, const Activations& x, float* out) {
  MatmulParams p;
  p.format = format;
  p.weights = w.data();
  p.k = k;
  p.row_block_end = row_blocks;
  p.num_tokens = tokens;
  p.x = x;
  p.out = out;
  p.out_stride = row_blocks * kRowBlock;
  return p;
}

/// float64 product of bf16 weights and bf16 activations, and the sum of the magnitudes.
inline void exact_bf16(const MatmulParams& p, int64_t token, int64_t row, double& sum,
                       double& magnitude) {
  const auto* w = static_cast<const uint16_t*>(p.weights) + row / 16 * ((p.k + 1) / 2) * 32;
  const auto widen = [](uint16_t bits) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return static_cast<double>(value);
  };
  sum = magnitude = 0;
  for (int64_t k = 0; k < p.k; ++k) {
    const double product =
        widen(w[k / 2 * 32 + row % 16 * 2 + k % 2]) * widen(p.x.bf16[token * (p.k + p.k % 2) + k]);
    sum += product;
    magnitude += std::fabs(product);
  }
}

/// All formats at several widths: equal to generic, and independent of the batch and of the split
/// into row blocks.
inline void check_matmul(const KernelTable& table, const std::vector<int>& token_counts) {
  KernelTable generic{};
  fill_matmul_generic(generic);
  std::mt19937 rng(7);
  constexpr int kRowBlocks = 5;
  for (int f = 0; f < kNumPackedFormats; ++f) {
    const auto format = static_cast<PackedFormat>(f);
    const bool quantized = format > PackedFormat::kF8;
    const bool superblocks = format >= PackedFormat::kQ4_K;
    const ActKind kind = table.act_kind[f];
    ASSERT_EQ(kind == ActKind::kI8, quantized);
    for (const int64_t k : superblocks ? std::vector<int64_t>{256, 768}
                           : quantized ? std::vector<int64_t>{32, 96, 576}
                                       : std::vector<int64_t>{1, 2, 7, 64, 129}) {
      const Aligned<uint8_t> w = random_weights(format, k, kRowBlocks, rng);
      for (const int tokens : token_counts) {
        for (int a15 = 0; a15 < (quantized ? 2 : 1); ++a15) {
          SCOPED_TRACE(std::string(table.name) + " " + format_name(format) +
                       " k=" + std::to_string(k) + " tokens=" + std::to_string(tokens) +
                       (a15 ? " A15" : ""));
          TestActivations x(tokens, k, rng);
          if (quantized) x.quantize(generic, a15 != 0);
          const size_t size = static_cast<size_t>(tokens) * kRowBlocks * kRowBlock;
          Aligned<float> out(size), expected(size), split(size);
          const MatmulParams p = params(format, w, k, kRowBlocks, tokens, x.view(0), out.data());
          table.matmul(p);
          if (kind == ActKind::kBF16) {
            for (int t = 0; t < tokens; ++t) {
              for (int n = 0; n < kRowBlocks * kRowBlock; ++n) {
                double sum, magnitude;
                exact_bf16(p, t, n, sum, magnitude);
                ASSERT_NEAR(out[static_cast<size_t>(t * p.out_stride + n)], sum,
                            1e-5 * magnitude + 1e-30);
              }
            }
          } else {
            MatmulParams reference = p;
            reference.out = expected.data();
            generic.matmul(reference);
            ASSERT_EQ(std::memcmp(out.data(), expected.data(), out.bytes()), 0)
                << "differs from generic";
          }
          for (int t = 0; t < tokens; ++t) {
            for (int rb = 0; rb < kRowBlocks; rb += 2) {
              MatmulParams one = params(format, w, k, rb + 2 < kRowBlocks ? rb + 2 : kRowBlocks, 1,
                                        x.view(t), split.data() + t * p.out_stride);
              one.row_block_begin = rb;
              one.out_stride = p.out_stride;
              table.matmul(one);
            }
          }
          ASSERT_EQ(std::memcmp(out.data(), split.data(), out.bytes()), 0)
              << "depends on the batch or on the split";
        }
      }
    }
  }
}

/// Quantization of ordinary and hostile rows: bit for bit that of generic.
inline void check_quantize(const KernelTable& table) {
  KernelTable generic{};
  fill_quantize_generic(generic);
  std::mt19937 rng(11);
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  const float special[] = {0.f,      -0.f, 1e-45f, 1e-39f, 1.5e-36f,    3.4e38f,
                           -3.4e38f, kInf, -kInf,  kNan,   63.5f / 127, 127.f};
  for (const bool a15 : {false, true}) {
    SCOPED_TRACE(std::string(table.name) + (a15 ? " A15" : " A8"));
    constexpr int kTokens = 64;
    constexpr int64_t k = 96;
    std::mt19937 same = rng;
    TestActivations x(kTokens, k, rng), y(kTokens, k, same);
    for (size_t i = 0; i < kTokens * k; ++i) {
      const size_t block = i / 32;
      float value = x.f32()[i];
      if (block % 3 == 1 && rng() % 20 == 0) value = special[rng() % std::size(special)];
      if (block % 3 == 2)
        value = special[block / 3 % std::size(special)] * (rng() % 2 == 0 ? 1.f : 0.25f);
      x.f32()[i] = y.f32()[i] = value;
    }
    x.quantize(table, a15);
    y.quantize(generic, a15);
    expect_same_bits(x, y);
  }
}

}  // namespace sagellm::kernels::testing
