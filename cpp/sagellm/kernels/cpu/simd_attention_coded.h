// Inner products of int8 pages, over integers. Include after simd_attention.h.
//
// A query row, and in every tile a row of weights, becomes 16-bit codes with one scale, so that a
// product sum is exact in 32 bits and the order of its additions is of no consequence. What the
// codes of q and p leave out is 2^-16 of the row's largest value, where int8 keys and values leave
// out 2^-8 of theirs. Masked tokens have weight code 0: stale bytes of theirs are multiplied, and
// add nothing.
#pragma once

namespace sagellm::kernels {
namespace {

struct CodedPolicy {
  /// Rows of codes [head_dim] and their scales.
  struct Query {
    const uint16_t* codes;
    const float* scale;
  };
  using Weight = float;

  static constexpr int kLargestCode = 32767;
  // The largest sums: 16-bit times 8-bit codes over the head dimension, and over the tokens of a
  // tile.
  static_assert(int64_t{kLargestCode} * 127 * kMaxHeadDim < INT32_MAX);
  static_assert(int64_t{kLargestCode} * 127 * kAttentionTile < INT32_MAX);

  static constexpr int kRowGroup = kLanes == 8 ? 4 : 8;
  static constexpr int columns(int rows) {  // accumulator registers per row in weigh()
    return kLanes == 8 ? (rows == 1 ? 8 : rows == 2 ? 4 : 2) : (rows <= 3 ? 8 : rows <= 6 ? 4 : 2);
  }

  static void encode(const float* x, int n, float inverse, uint16_t* codes) {
    const Vec factor = set(inverse);
    for (int i = 0; i < n; i += kLanes) {
      store_low16(codes + i, keep_bits(round_to_int(mul(load(x + i), factor)), 0xffffu));
    }
  }

  static void prepare(const float* q, float factor, int head_dim, int row, AttentionScratch& s) {
    const CodeScale code = code_scale(q, head_dim, kLargestCode);
    encode(q, head_dim, code.inverse, s.q16 + row * head_dim);
    s.q_scale[row] = code.scale * factor;
  }
  static Query queries(const AttentionScratch& s, int row, int head_dim) {
    return {s.q16 + row * head_dim, s.q_scale + row};
  }

  template <int kRows, bool kPrefetch>
  static void score(Query q, const uint8_t* page, const uint8_t* ahead, int head_dim, float* out) {
    constexpr int kParts = kSubPage / kLanes;
    const CodedPage coded = coded_page(page, head_dim);
    IntVec dot[kRows][kParts];
    for (int r = 0; r < kRows; ++r) {
      for (int part = 0; part < kParts; ++part) dot[r][part] = zero_int();
    }
    for (int i = 0; i < head_dim / 2; ++i) {
      if constexpr (kPrefetch) {
        if (i % 2 == 0) prefetch_l2(ahead + i * 2 * kSubPage);
      }
      IntVec key[kParts];
      for (int part = 0; part < kParts; ++part) {
        key[part] = load_code_pairs(coded.keys + i * 2 * kSubPage + part * 2 * kLanes);
      }
      for (int r = 0; r < kRows; ++r) {
        const IntVec pair = broadcast_pair(q.codes + r * head_dim + 2 * i);
        for (int part = 0; part < kParts; ++part) {
          dot[r][part] = dot_codes(dot[r][part], key[part], pair);
        }
      }
    }
    if constexpr (kPrefetch) {
      prefetch_l2(ahead + kSubPage * head_dim);  // as many as the scales have
    }
    for (int part = 0; part < kParts; ++part) {
      const Vec scale = load(coded.key_scales + part * kLanes);
      for (int r = 0; r < kRows; ++r) {
        store(out + r * kAttentionTile + part * kLanes,
              mul(to_float(dot[r][part]), mul(scale, set(q.scale[r]))));
      }
    }
  }

  static Weight* weights(AttentionScratch& s) { return s.scores; }
  /// Stores p times the scale of its token's V, 0 where p is 0; returns p, which is what l sums.
  static Vec store_weights(const TilePages& tile, int i, int head_dim, Weight* out, Vec p) {
    const Vec scale =
        load(coded_page(tile.page[i / kSubPage], head_dim).value_scales + i % kSubPage);
    store(out, select(less(zero(), p), mul(p, scale), zero()));
    return p;
  }

  template <int kRows, int kColumns>
  static void weigh_columns(const TilePages& tile, int first, int last, const uint16_t* codes,
                            const float* scale, int head_dim, int d, float* acc) {
    IntVec sum[kRows][kColumns];
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kColumns; ++c) sum[r][c] = zero_int();
    }
    constexpr int kBytes = 2 * kColumns * kLanes;  // of a token pair
    const int first_byte = 2 * d * (kAttentionTile / 2);
    for (int s = first; s < last; ++s) {
      const int8_t* value = coded_page(tile.page[s], head_dim).values + 2 * d;
      const uint16_t* code = codes + s * kSubPage;
      const uint8_t* ahead = tile.ahead_of_values(first_byte + s * (kSubPage / 2) * kBytes);
      for (int pair = 0; pair < kSubPage / 2; ++pair, value += 2 * head_dim, code += 2) {
        if (tile.prefetch && pair * kBytes % 64 == 0) {
          prefetch_run<(kBytes < 64 ? 64 : kBytes)>(ahead + pair * kBytes);
        }
        IntVec weight[kRows];
        for (int r = 0; r < kRows; ++r) weight[r] = broadcast_pair(code + r * kAttentionTile);
        for (int c = 0; c < kColumns; ++c) {
          const IntVec v = load_code_pairs(value + c * 2 * kLanes);
          for (int r = 0; r < kRows; ++r) sum[r][c] = dot_codes(sum[r][c], v, weight[r]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      float* out = acc + r * head_dim + d;
      for (int c = 0; c < kColumns; ++c, out += kLanes) {
        store(out, fma(to_float(sum[r][c]), set(scale[r]), load(out)));
      }
    }
  }

  template <int kRows, int kColumns>
  static void weigh_rest(const TilePages& tile, int first, int last, const uint16_t* codes,
                         const float* scale, int head_dim, int d, float* acc) {
    for (; d + kColumns * kLanes <= head_dim; d += kColumns * kLanes) {
      weigh_columns<kRows, kColumns>(tile, first, last, codes, scale, head_dim, d, acc);
    }
    if constexpr (kColumns * kLanes > 16) {
      weigh_rest<kRows, kColumns / 2>(tile, first, last, codes, scale, head_dim, d, acc);
    }
  }

  template <int kRows>
  static void weigh(const TilePages& tile, Range seen, const Weight* w, int head_dim, float* acc) {
    const int first = seen.begin / kSubPage, last = (seen.end + kSubPage - 1) / kSubPage;
    const int begin = first * kSubPage, count = (last - first) * kSubPage;
    alignas(64) uint16_t codes[kRows * kAttentionTile];
    float scale[kRows];
    for (int r = 0; r < kRows; ++r) {
      const int at = r * kAttentionTile + begin;
      const CodeScale code = code_scale(w + at, count, kLargestCode);
      encode(w + at, count, code.inverse, codes + at);
      scale[r] = code.scale;
    }
    if (tile.prefetch) {  // the end of the second half: as many bytes as four rows of scales have
      prefetch_run<4 * kSubPage * sizeof(float)>(tile.ahead_of_values(4 * kSubPage * head_dim));
    }
    weigh_rest<kRows, columns(kRows)>(tile, first, last, codes, scale, head_dim, 0, acc);
  }
};

}  // namespace
}  // namespace sagellm::kernels
