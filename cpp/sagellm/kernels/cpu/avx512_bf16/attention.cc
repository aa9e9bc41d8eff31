// AVX512_BF16 attention: scaled queries and softmax weights are rounded to bfloat16 and multiplied
// in pairs.
#include "attention.h"

#include "sagellm/kernels/params.h"

// The vector type comes first, then what is written in terms of it.
// clang-format off
#include "vmath_bf16.h"
#include "../simd_math.h"
#include "../simd_attention.h"
// clang-format on

namespace sagellm::kernels {
namespace {

/// A score is two chains over the pairs of dimensions, even and odd pairs, then their sum; an
/// output is one chain over the token pairs. One lane of vdpbf16ps adds the odd product after the
/// even one.
struct PairPolicy {
  using Query = uint16_t;
  using Weight = uint16_t;

  static constexpr int columns(int rows) { return rows <= 3 ? 8 : rows <= 6 ? 4 : 2; }
  static constexpr int kRowGroup = 8;

  static Query* queries(AttentionScratch& s) { return s.q16; }
  static int query_stride(int head_dim) { return head_dim; }
  static void prepare(const float* q, float factor, int head_dim, Query* out) {
    const Vec f = set(factor);
    for (int i = 0; i < head_dim; i += kLanes) store_bf16(out + i, mul(load(q + i), f));
  }

  static Weight* weights(AttentionScratch& s) { return s.weights16; }
  static Vec store_weights(Weight* out, Vec p) {
    const Vec rounded =
        round_positive_bf16(p);  // summed as rounded, so that the weights add up to one
    store_bf16(out, rounded);
    return rounded;
  }

  template <int kRows, bool kPrefetch>
  static void score(const Query* q, const uint16_t* page, const uint16_t* ahead, int head_dim,
                    float* out) {
    Vec first[kRows], second[kRows];
    for (int r = 0; r < kRows; ++r) first[r] = second[r] = zero();
    for (int d = 0; d < head_dim; d += 4) {
      const uint16_t* key = page + d * kSubPage;
      if constexpr (kPrefetch) {
        const uint16_t* next = ahead + d * kSubPage;
        prefetch_l2(next);
        prefetch_l2(next + 32);
        prefetch_l2(next + kSubPage * head_dim);
        prefetch_l2(next + kSubPage * head_dim + 32);
      }
      const IntVec k0 = load_pairs(key), k1 = load_pairs(key + 2 * kSubPage);
      for (int r = 0; r < kRows; ++r) {
        first[r] = dot_pairs(first[r], k0, broadcast_pair(q + r * head_dim + d));
        second[r] = dot_pairs(second[r], k1, broadcast_pair(q + r * head_dim + d + 2));
      }
    }
    for (int r = 0; r < kRows; ++r) store(out + r * kAttentionTile, add(first[r], second[r]));
  }

  template <int kRows, int kColumns>
  struct Accumulator {
    Vec acc[kRows][kColumns];

    /// acc += p * v for one token pair; `keep` clears the half of V that no row sees.
    inline void step(const Weight* w, const uint16_t* value, uint32_t keep) {
      IntVec v[kColumns];
      for (int c = 0; c < kColumns; ++c) v[c] = keep_bits(load_pairs(value + c * 2 * kLanes), keep);
      for (int r = 0; r < kRows; ++r) {
        const IntVec weight = broadcast_pair(w + r * kAttentionTile);
        for (int c = 0; c < kColumns; ++c) acc[r][c] = dot_pairs(acc[r][c], v[c], weight);
      }
    }
  };
};

void attention(const AttentionParams& p) { attend<PairPolicy>(p); }

}  // namespace

void fill_attention_avx512_bf16(KernelTable& table) {
  table.attention = attention;
  table.attention_finish = attention_finish;
  table.attention_scratch_bytes = sizeof(AttentionScratch);
}

}  // namespace sagellm::kernels
