// The checks that test_attention.cc runs on real kernels and simd_emulation runs on emulated ones.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "sagellm/kernels/params.h"
#include "sagellm/tensor/buffer.h"

namespace sagellm::kernels {

/// One sequence whose pool is allocated exactly, full of NaN where nothing was written.
struct Sequence {
  std::vector<float> k, v;
  std::vector<uint16_t> pool;  // 16-bit NaN patterns, seen as whatever the pages hold
  std::vector<int32_t> table;
  KvView view;

  Sequence(int tokens, int head_dim, int block_size, unsigned seed, KvDtype dtype) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const auto blocks = static_cast<size_t>((tokens + block_size - 1) / block_size);
    const auto sub_page = static_cast<int32_t>(kv_sub_page_bytes(dtype, head_dim));
    const int64_t page = int64_t{block_size / kSubPage} * sub_page;
    k.resize(static_cast<size_t>(tokens * head_dim));
    v.resize(k.size());
    for (float& x : k) x = normal(random);
    for (float& x : v) x = normal(random);
    pool.assign(blocks * static_cast<size_t>(page) / 2, 0xffff);
    for (size_t i = 0; i < blocks; ++i) table.push_back(static_cast<int32_t>(blocks - 1 - i));
    view = {
        reinterpret_cast<uint8_t*>(pool.data()), page, 0, block_size, head_dim, sub_page, dtype};
  }

  void write(const KernelTable& kernels, int begin, int end) {
    KvWriteParams p;
    p.kv = view;
    p.block_table = table.data();
    p.first_position = begin;
    p.num_tokens = end - begin;
    p.k = k.data() + begin * view.head_dim;
    p.v = v.data() + begin * view.head_dim;
    p.stride = view.head_dim;
    kernels.kv_write(p);
  }
};

struct States {
  std::vector<float> m, l, acc;
};

inline constexpr KvDtype kDtypes[] = {KvDtype::kBF16, KvDtype::kI8};

struct Shape {
  int head_dim = 64;
  int group = 3;
  int tokens = 10;
  int first = 0;
  int window = 0;
  float softcap = 0.f;
};

inline std::vector<float> random_floats(size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& value : x) value = normal(random);
  return x;
}

inline void attend(const KernelTable& kernels, Sequence& sequence, const Shape& shape,
                   const float* q, int token, int count, int split_begin, int split_end,
                   States& out) {
  const auto rows = static_cast<size_t>(count * shape.group);
  const size_t at = out.m.size();
  out.m.resize(at + rows);
  out.l.resize(at + rows);
  out.acc.resize((at + rows) * static_cast<size_t>(shape.head_dim));
  Buffer scratch(kernels.attention_scratch_bytes);
  AttentionParams p;
  p.kv = sequence.view;
  p.block_table = sequence.table.data();
  p.q = q + token * shape.group * shape.head_dim;
  p.q_stride = shape.group * shape.head_dim;
  p.group = shape.group;
  p.num_tokens = count;
  p.first_position = shape.first + token;
  p.split_begin = split_begin;
  p.split_end = split_end;
  p.window = shape.window;
  p.scale = 1.f / std::sqrt(static_cast<float>(shape.head_dim));
  p.softcap = shape.softcap;
  // A hint that starts and ends inside a tile; the block table ends where the sequence does.
  p.next = {p.block_table, 0, (shape.first + shape.tokens) / 2, shape.first + shape.tokens};
  p.m = out.m.data() + at;
  p.l = out.l.data() + at;
  p.acc = out.acc.data() + at * static_cast<size_t>(shape.head_dim);
  p.scratch = scratch.data();
  kernels.attention(p);
}

inline std::vector<float> finish(const KernelTable& kernels, const States& s, int count, int rows,
                                 int head_dim) {
  std::vector<float> out(static_cast<size_t>(rows * head_dim));
  AttentionFinishParams p;
  p.m = s.m.data();
  p.l = s.l.data();
  p.acc = s.acc.data();
  p.count = count;
  p.rows = rows;
  p.head_dim = head_dim;
  p.out = out.data();
  p.out_stride = head_dim;
  kernels.attention_finish(p);
  return out;
}

inline int splits(const Shape& s) { return (s.first + s.tokens - 1) / kAttentionSplit + 1; }

inline const std::vector<Shape>& shapes() {
  static const std::vector<Shape> all = {
      {64, 3, 10, 0, 0, 0.f},  {64, 7, 4, 60, 0, 0.f},    {80, 1, 32, 490, 0, 0.f},
      {256, 4, 8, 13, 0, 0.f}, {64, 2, 16, 100, 37, 0.f}, {128, 5, 6, 1020, 0, 30.f},
      {96, 8, 4, 77, 64, 5.f}, {16, 40, 1, 33, 0, 0.f},   {64, 1, 1, 0, 0, 0.f}};
  return all;
}

inline std::string describe(const Shape& s) {
  return "head_dim " + std::to_string(s.head_dim) + " group " + std::to_string(s.group) +
         " first " + std::to_string(s.first) + " window " + std::to_string(s.window);
}

inline void expect_same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  ASSERT_EQ(a.size(), b.size());
  EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size() * sizeof(float)), 0);
}

/// Same K, V and q give the generic table's output, within the rounding of the path.
inline void expect_agreement(const KernelTable& kernels, const KernelTable& generic,
                             KvDtype dtype) {
  // bfloat16 queries and weights move a row that sees few tokens by up to 2^-8 of a value of 2; on
  // average far less. Their 16-bit codes, over int8 pages, move it by 2^-16 of the largest.
  const bool bf16 = dtype == KvDtype::kBF16 && std::string(kernels.name) == "avx512_bf16";
  const bool coded = dtype == KvDtype::kI8;
  const float tolerance = bf16 ? 8e-3f : coded ? 3e-4f : 2e-5f;
  const double relative_tolerance = bf16 ? 4e-3 : coded ? 1e-4 : 1e-5;
  for (const Shape& s : shapes()) {
    SCOPED_TRACE(describe(s));
    Sequence sequence(s.first + s.tokens, s.head_dim, 32, 1, dtype);
    sequence.write(kernels, 0, s.first + s.tokens);
    const auto q = random_floats(static_cast<size_t>(s.tokens * s.group * s.head_dim), 2);
    States mine, theirs;
    attend(kernels, sequence, s, q.data(), 0, s.tokens, 0, splits(s), mine);
    attend(generic, sequence, s, q.data(), 0, s.tokens, 0, splits(s), theirs);
    const auto a = finish(kernels, mine, 1, s.tokens * s.group, s.head_dim);
    const auto b = finish(generic, theirs, 1, s.tokens * s.group, s.head_dim);
    double difference = 0, norm = 0;
    for (size_t i = 0; i < a.size(); ++i) {
      ASSERT_NEAR(a[i], b[i], tolerance) << i;
      difference += std::pow(a[i] - b[i], 2);
      norm += std::pow(b[i], 2);
    }
    EXPECT_LT(std::sqrt(difference / norm), relative_tolerance);
  }
}

/// Rows computed one token at a time, before later tokens exist, equal those of the whole tile.
inline void expect_row_independence(const KernelTable& kernels, KvDtype dtype) {
  for (const Shape& s : shapes()) {
    SCOPED_TRACE(describe(s));
    Sequence sequence(s.first + s.tokens, s.head_dim, 16, 3, dtype);
    sequence.write(kernels, 0, s.first);
    const auto q = random_floats(static_cast<size_t>(s.tokens * s.group * s.head_dim), 4);
    States alone, tile;
    for (int t = 0; t < s.tokens; ++t) {
      sequence.write(kernels, s.first + t, s.first + t + 1);
      attend(kernels, sequence, s, q.data(), t, 1, 0, splits(s), alone);
    }
    attend(kernels, sequence, s, q.data(), 0, s.tokens, 0, splits(s), tile);
    expect_same_bits(alone.m, tile.m);
    expect_same_bits(alone.l, tile.l);
    expect_same_bits(alone.acc, tile.acc);
  }
}

/// One call per split, merged by attention_finish, equals one call over all splits.
inline void expect_split_merge(const KernelTable& kernels, KvDtype dtype) {
  for (const int window : {0, 700}) {
    const Shape s{64, 3, 1, 1290, window, 0.f};
    Sequence sequence(s.first + 1, s.head_dim, 64, 5, dtype);
    sequence.write(kernels, 0, s.first + 1);
    const auto q = random_floats(static_cast<size_t>(s.group * s.head_dim), 6);
    States whole, parts;
    attend(kernels, sequence, s, q.data(), 0, 1, 0, 3, whole);
    for (int split = 0; split < 3; ++split)
      attend(kernels, sequence, s, q.data(), 0, 1, split, split + 1, parts);
    expect_same_bits(finish(kernels, whole, 1, 3, 64), finish(kernels, parts, 3, 3, 64));
  }
}

/// int8 pages hold the bytes that the generic table writes, also of rows that are tiny or not
/// finite.
inline void expect_same_codes(const KernelTable& kernels, const KernelTable& generic) {
  for (const int head_dim : {16, 64, 80, 256}) {
    Sequence mine(40, head_dim, 16, 9, KvDtype::kI8), theirs(40, head_dim, 16, 9, KvDtype::kI8);
    for (Sequence* sequence : {&mine, &theirs}) {
      const auto row = static_cast<size_t>(head_dim);
      const float special[] = {0.f,
                               -0.f,
                               1e-42f,
                               1e-30f,
                               3e38f,
                               std::nanf("7"),
                               -std::numeric_limits<float>::infinity()};
      for (size_t i = 0; i < std::size(special); ++i) sequence->k[3 * row * i + 5] = special[i];
      std::fill_n(sequence->v.begin(), row, -0.f);
      std::fill_n(sequence->v.begin() + 2 * static_cast<ptrdiff_t>(row), row, 1e-33f);
      std::fill_n(sequence->v.begin() + 4 * static_cast<ptrdiff_t>(row), row, std::nanf(""));
    }
    mine.write(kernels, 0, 17);
    mine.write(kernels, 17, 40);
    theirs.write(generic, 0, 40);
    EXPECT_EQ(mine.pool, theirs.pool) << head_dim;
  }
}

/// Element-wise kernels against the generic ones, with tails of every length and on special values.
inline void expect_elementwise_agreement(const KernelTable& kernels, const KernelTable& generic) {
  const auto near = [](const std::vector<float>& a, const std::vector<float>& b) {
    for (size_t i = 0; i < a.size(); ++i) {
      if (std::isnan(b[i])) {
        EXPECT_TRUE(std::isnan(a[i])) << i;
      } else if (std::isinf(b[i])) {
        EXPECT_EQ(a[i], b[i]) << i;
      } else {
        EXPECT_NEAR(a[i], b[i], 2e-6f * std::fabs(b[i]) + 1e-35f) << i;
      }
    }
  };
  for (size_t n = 1; n < 70; ++n) {
    const auto size = static_cast<int64_t>(n);
    std::vector<float> x = random_floats(n, 7), y = random_floats(n, 8), a(n), b(n);
    x[0] = std::numeric_limits<float>::infinity();
    if (n > 5) x[3] = -x[0], x[5] = std::nanf("");
    for (float& value : x) value *= 3.f;
    for (const auto entry :
         {&KernelTable::add, &KernelTable::silu_mul, &KernelTable::gelu_tanh_mul}) {
      (kernels.*entry)(x.data(), y.data(), size, a.data());
      (generic.*entry)(x.data(), y.data(), size, b.data());
      near(a, b);
    }
    a = b = x;
    kernels.softcap(a.data(), 2.5f, size);
    generic.softcap(b.data(), 2.5f, size);
    near(a, b);
    kernels.rms_norm(y.data(), y.data(), 1e-6f, size, a.data());
    generic.rms_norm(y.data(), y.data(), 1e-6f, size, b.data());
    near(a, b);
    float value_a = 0, value_b = 0;
    int32_t index_a = -1, index_b = -1;
    kernels.argmax(x.data(), size, &value_a, &index_a);
    generic.argmax(x.data(), size, &value_b, &index_b);
    EXPECT_EQ(index_a, index_b);
    EXPECT_NEAR(kernels.sum_exp(y.data(), 3.f, size), generic.sum_exp(y.data(), 3.f, size), 1e-5);
    std::vector<double> w(n + 1, -1.0), v(n + 1, -1.0);  // one more, to see a write past the end
    std::vector<float> masked = y;
    masked[n / 2] = -std::numeric_limits<float>::infinity();
    const double sum_w = kernels.sampling_weights(masked.data(), size, 4.0, 2.5, -3.f, w.data());
    const double sum_v = generic.sampling_weights(masked.data(), size, 4.0, 2.5, -3.f, v.data());
    EXPECT_NEAR(sum_w, sum_v, 1e-14 * sum_v);
    EXPECT_EQ(w[n / 2], 0.0);
    for (size_t i = 0; i <= n; ++i) EXPECT_NEAR(w[i], v[i], 2e-15 * std::fabs(v[i])) << i;
    a = b = y;
    if (n % 2 == 0) {
      kernels.rope(a.data(), y.data() + n / 2, y.data(), size);
      generic.rope(b.data(), y.data() + n / 2, y.data(), size);
      for (size_t i = 0; i < n; ++i) EXPECT_NEAR(a[i], b[i], 1e-5f) << i;
    }
  }
}

}  // namespace sagellm::kernels
