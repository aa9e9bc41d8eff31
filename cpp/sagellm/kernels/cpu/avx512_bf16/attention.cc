// AVX512_BF16 attention: scaled queries and softmax weights are rounded to bfloat16 and multiplied
// in pairs.
#include "attention.h"

#include "sagellm/kernels/params.h"

// The vector type comes first, then what is written in terms of it.
// clang-format off
#include "vmath_bf16.h"
#include "../simd_math.h"
#include "../kv_page.h"
#include "../simd_attention.h"
#include "../simd_attention_coded.h"
// clang-format on

namespace sagellm::kernels {
namespace {

/// A score is two chains over the pairs of dimensions, even and odd pairs, then their sum; an
/// output is one chain over the token pairs. One lane of vdpbf16ps adds the odd product after the
/// even one.
struct PairPolicy {
  using Query = const uint16_t*;
  using Weight = uint16_t;

  static constexpr int columns(int rows) { return rows <= 3 ? 8 : rows <= 6 ? 4 : 2; }
  static constexpr int kRowGroup = 8;

  static void prepare(const float* q, float factor, int head_dim, int row, AttentionScratch& s) {
    const Vec f = set(factor);
    uint16_t* out = s.q16 + row * head_dim;
    for (int i = 0; i < head_dim; i += kLanes) store_bf16(out + i, mul(load(q + i), f));
  }

  static Query queries(const AttentionScratch& s, int row, int head_dim) {
    return s.q16 + row * head_dim;
  }

  static Weight* weights(AttentionScratch& s) { return s.weights16; }
  static Vec store_weights(const TilePages&, int, int, Weight* out, Vec p) {
    const Vec rounded =
        round_positive_bf16(p);  // summed as rounded, so that the weights add up to one
    store_bf16(out, rounded);
    return rounded;
  }

  template <int kRows, bool kPrefetch>
  static void score(Query q, const uint8_t* page, const uint8_t* ahead, int head_dim, float* out) {
    Vec first[kRows], second[kRows];
    for (int r = 0; r < kRows; ++r) first[r] = second[r] = zero();
    for (int d = 0; d < head_dim; d += 4) {
      const uint16_t* key = bf16_keys(page) + d * kSubPage;
      if constexpr (kPrefetch) {
        const uint8_t* next = ahead + d * 2 * kSubPage;
        prefetch_l2(next);
        prefetch_l2(next + 64);
      }
      const IntVec k0 = load_pairs(key), k1 = load_pairs(key + 2 * kSubPage);
      for (int r = 0; r < kRows; ++r) {
        first[r] = dot_pairs(first[r], k0, broadcast_pair(q + r * head_dim + d));
        second[r] = dot_pairs(second[r], k1, broadcast_pair(q + r * head_dim + d + 2));
      }
    }
    for (int r = 0; r < kRows; ++r) store(out + r * kAttentionTile, add(first[r], second[r]));
  }

  template <int kRows>
  static void weigh(const TilePages& tile, Range seen, const Weight* w, int head_dim, float* acc) {
    weigh_pairs<PairPolicy, kRows>(tile, seen, w, head_dim, 0, acc);
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

void attention(const AttentionParams& p) {
  if (p.kv.dtype == KvDtype::kI8) return attend<CodedPolicy>(p);
  attend<PairPolicy>(p);
}

}  // namespace

void fill_attention_avx512_bf16(KernelTable& table) {
  table.attention = attention;
  table.attention_finish = attention_finish;
  table.attention_scratch_bytes = sizeof(AttentionScratch);
}

}  // namespace sagellm::kernels
