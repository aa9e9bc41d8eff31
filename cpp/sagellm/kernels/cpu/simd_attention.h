// Paged attention over vector registers, written once for every SIMD instruction set.
//
// Include after the folder's vmath.h, simd_math.h and kv_page.h. `attend<Policy>` holds the control
// flow and the softmax; the Policy holds the two inner products. Semantics: AttentionParams in
// params.h.
//
// The order of floating-point operations is fixed for one (query row, output) whatever else the
// call computes:
//   1. score of a token: fma chains over the head dimension (see the Policy), then their sum;
//   integer sums, exact in any order, in int8 pages;
//   2. tile maximum: exact, hence order-free. If it exceeds m: c = exp2(m - max), l *= c, acc *= c,
//   m = max;
//   3. p = exp2(score - m), 0 where masked, in the Policy's precision; l += sum of the tile: lane
//   sums over ascending tokens, one fixed tree;
//   4. acc[d] gains p * v in ascending token order, in one chain; in int8 pages one integer sum per
//   tile;
//   5. splits are merged in ascending order by merge_state(), in attention() and in
//   attention_finish() alike.
// A tile without a visible token for a row leaves that row's state untouched; a token or V slot the
// row does not see is never multiplied, so stale or foreign bytes (NaN included) cannot reach it.
#pragma once

namespace sagellm::kernels {
namespace {

constexpr float kNegativeInfinity = -__builtin_inff();
constexpr int kTileSubPages = kAttentionTile / kSubPage;
constexpr int kPrefetchTiles =
    2;  // how far ahead of the tile being computed the next K and V lines are requested

constexpr int kMaxRowGroup = 8;  // rows that share one pass over a tile

struct AttentionScratch {
  alignas(64) float q[kAttentionRows * kMaxHeadDim];       // scaled queries of a widening policy
  alignas(64) uint16_t q16[kAttentionRows * kMaxHeadDim];  // bfloat16 or codes in other policies
  float q_scale[kAttentionRows];                           // of the codes
  alignas(64) float acc[kAttentionRows * kMaxHeadDim];     // state of the split being built
  alignas(64) float scores[kMaxRowGroup * kAttentionTile];
  alignas(64) uint16_t weights16[kMaxRowGroup * kAttentionTile];
  float m[kAttentionRows];
  float l[kAttentionRows];
};

/// Softmax states of consecutive rows.
struct StateView {
  float* m;
  float* l;
  float* acc;  // [rows][head_dim]
};

/// The sub-pages of one tile; entries of `page` outside [first, last) are not set. While a tile is
/// computed the one ahead is requested, line by line in the order of addresses and evenly over the
/// time, so that memory is busy throughout: the first half during the scores, the second during the
/// values.
struct TilePages {
  const uint8_t* page[kTileSubPages];
  const uint8_t* ahead[kTileSubPages];
  int page_bytes;
  int first;
  int last;
  bool prefetch;

  /// What to request during the scores of a sub-page: half as many bytes as that has.
  const uint8_t* ahead_of_scores(int sub_page) const {
    return ahead[sub_page / 2] + sub_page % 2 * (page_bytes / 2);
  }
  /// Where the bytes from `offset` of the second half are.
  const uint8_t* ahead_of_values(int offset) const {
    return offset < page_bytes ? ahead[kTileSubPages / 2] + offset
                               : ahead[kTileSubPages / 2 + 1] + (offset - page_bytes);
  }
};

/// Requests the lines of the next kBytes bytes: the middles of equal parts, of a line at most.
template <int kBytes>
inline void prefetch_run(const uint8_t* p) {
  constexpr int kParts = (kBytes + 63) / 64;
  for (int part = 0; part < kParts; ++part) prefetch_l2(p + kBytes * (2 * part + 1) / (2 * kParts));
}

/// Token range [begin, end) that a row sees.
struct Range {
  int begin;
  int end;
};

inline int min_int(int a, int b) { return a < b ? a : b; }
inline int max_int(int a, int b) { return a > b ? a : b; }

inline float exp2_scalar(float x) {
  alignas(64) float lane[kLanes];
  store(lane, exp2(set(x)));
  return lane[0];
}

inline void scale_row(float* acc, float factor, int n) {
  const Vec f = set(factor);
  for (int i = 0; i < n; i += kLanes) store(acc + i, mul(load(acc + i), f));
}

inline void clear_state(StateView s, int rows, int head_dim) {
  for (int r = 0; r < rows; ++r) {
    s.m[r] = kNegativeInfinity;
    s.l[r] = 0.f;
  }
  for (int i = 0; i < rows * head_dim; i += kLanes) store(s.acc + i, zero());
}

/// (m, l, acc) <- merge((m, l, acc), b). An empty side (l == 0) leaves the other as it is.
inline void merge_state(float* m, float* l, float* acc, float bm, float bl, const float* bacc,
                        int head_dim) {
  if (bl == 0.f) return;
  if (*l == 0.f) {
    *m = bm;
    *l = bl;
    for (int i = 0; i < head_dim; i += kLanes) store(acc + i, load(bacc + i));
    return;
  }
  const float top = *m > bm ? *m : bm;
  const float ca = exp2_scalar(*m - top), cb = exp2_scalar(bm - top);
  const Vec va = set(ca), vb = set(cb);
  *m = top;
  *l = __builtin_fmaf(bl, cb, *l * ca);
  for (int i = 0; i < head_dim; i += kLanes) {
    store(acc + i, fma(load(bacc + i), vb, mul(load(acc + i), va)));
  }
}

inline Range visible(const AttentionParams& p, int row) {
  const int position = p.first_position + row / p.group;
  return {p.window > 0 ? max_int(0, position - p.window + 1) : 0, position + 1};
}

// ------------------------------------------------------------------------------------------------
// Weighted values of bfloat16 pages: acc[r][d] += sum over the tokens of `seen` of w[r][token] *
// v[token][d], for kRows rows that see the same tokens. Register block: kRows x kColumns vectors.
template <class Policy, int kRows, int kColumns>
inline void weigh_columns(const TilePages& tile, Range seen, const typename Policy::Weight* w,
                          int head_dim, int d, float* acc) {
  typename Policy::template Accumulator<kRows, kColumns> a;
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) a.acc[r][c] = load(acc + r * head_dim + d + c * kLanes);
  }
  constexpr int kBytes = 4 * kColumns * kLanes;  // of a token pair
  const int first_byte = 4 * d * (kAttentionTile / 2);
  const auto value = [&](int pair) {
    return bf16_values(tile.page[pair / 8], head_dim) + (pair % 8) * 2 * head_dim + 2 * d;
  };
  if (seen.begin % 2 != 0) a.step(w + seen.begin - 1, value(seen.begin / 2), 0xffff0000u);
  int pair = (seen.begin + 1) / 2;
  while (pair < seen.end / 2) {
    const uint16_t* v = value(pair);
    const int stop = min_int(seen.end / 2, (pair / 8 + 1) * 8);
    const uint8_t* ahead = tile.ahead_of_values(first_byte + pair * kBytes);
    for (; pair < stop; ++pair, v += 2 * head_dim, ahead += kBytes) {
      if (tile.prefetch) prefetch_run<kBytes>(ahead);
      a.step(w + 2 * pair, v, 0xffffffffu);
    }
  }
  if (seen.end % 2 != 0) a.step(w + seen.end - 1, value(seen.end / 2), 0x0000ffffu);
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) store(acc + r * head_dim + d + c * kLanes, a.acc[r][c]);
  }
}

template <class Policy, int kRows, int kColumns = Policy::columns(kRows)>
inline void weigh_pairs(const TilePages& tile, Range seen, const typename Policy::Weight* w,
                        int head_dim, int d, float* acc) {
  constexpr int kWidth = kColumns * kLanes;
  const auto fits = [](int left) {  // three vectors must not leave a single one
    return left >= kWidth && (kColumns != 3 || left != kWidth + kLanes);
  };
  for (; fits(head_dim - d); d += kWidth) {
    weigh_columns<Policy, kRows, kColumns>(tile, seen, w, head_dim, d, acc);
  }
  if constexpr (kWidth > 16)
    weigh_pairs<Policy, kRows, kColumns == 3 ? 2 : kColumns / 2>(tile, seen, w, head_dim, d, acc);
}

// ------------------------------------------------------------------------------------------------
// Inner products on fp32 lanes: bfloat16 K and V are widened exactly. A score is two chains over
// ascending dimension, even and odd, then even + odd.
struct WidenPolicy {
  using Query = const float*;
  using Weight = float;

  /// Accumulator registers per row in weigh(): enough chains to hide the latency of an addition.
  static constexpr int columns(int rows) {
    return kLanes == 8 ? (rows == 1   ? 8
                          : rows == 2 ? 4
                          : rows == 3 ? 3
                                      : 2)
                       : (rows <= 3   ? 8
                          : rows <= 6 ? 4
                                      : 2);
  }
  static constexpr int kRowGroup = kLanes == 8 ? 4 : 8;
  static constexpr int kFullRows = 3;  // rows whose scores of a whole sub-page fit the registers

  static void prepare(const float* q, float factor, int head_dim, int row, AttentionScratch& s) {
    const Vec f = set(factor);
    float* out = s.q + row * head_dim;
    for (int i = 0; i < head_dim; i += kLanes) store(out + i, mul(load(q + i), f));
  }

  static Query queries(const AttentionScratch& s, int row, int head_dim) {
    return s.q + row * head_dim;
  }

  static Weight* weights(AttentionScratch& s) { return s.scores; }
  /// Stores the weights and returns their values as stored, which is what l sums.
  static Vec store_weights(const TilePages&, int, int, Weight* out, Vec p) {
    store(out, p);
    return p;
  }

  template <int kRows, bool kPrefetch>
  static void score(Query q, const uint8_t* page, const uint8_t* ahead, int head_dim, float* out) {
    // As many halves of the sub-page at once as the registers hold: they share the queries.
    constexpr int kHalves = kSubPage / kLanes, kParts = kRows <= kFullRows ? kHalves : 1;
    for (int half = 0; half < kHalves; half += kParts) {
      Vec even[kRows][kParts], odd[kRows][kParts];
      for (int r = 0; r < kRows; ++r) {
        for (int part = 0; part < kParts; ++part) even[r][part] = odd[r][part] = zero();
      }
      const uint16_t* key = bf16_keys(page) + half * 2 * kLanes;
      for (int i = 0; i < head_dim / 2; ++i, key += 2 * kSubPage) {
        if constexpr (kPrefetch) {
          if (half == 0) prefetch_l2(ahead + i * 64);
        }
        Vec k[kParts];
        for (int part = 0; part < kParts; ++part) {
          k[part] = even_element(load_pairs(key + part * 2 * kLanes));
        }
        for (int r = 0; r < kRows; ++r) {
          const Vec query = set(q[r * head_dim + 2 * i]);
          for (int part = 0; part < kParts; ++part)
            even[r][part] = fma(query, k[part], even[r][part]);
        }
        for (int part = 0; part < kParts; ++part) {
          k[part] = odd_element(load_pairs(key + part * 2 * kLanes));
        }
        for (int r = 0; r < kRows; ++r) {
          const Vec query = set(q[r * head_dim + 2 * i + 1]);
          for (int part = 0; part < kParts; ++part)
            odd[r][part] = fma(query, k[part], odd[r][part]);
        }
      }
      for (int r = 0; r < kRows; ++r) {
        for (int part = 0; part < kParts; ++part) {
          store(out + r * kAttentionTile + (half + part) * kLanes,
                add(even[r][part], odd[r][part]));
        }
      }
    }
  }

  template <int kRows>
  static void weigh(const TilePages& tile, Range seen, const Weight* w, int head_dim, float* acc) {
    weigh_pairs<WidenPolicy, kRows>(tile, seen, w, head_dim, 0, acc);
  }

  template <int kRows, int kColumns>
  struct Accumulator {
    Vec acc[kRows][kColumns];

    /// acc += p * v for one token pair; `keep` clears the half of V that no row sees.
    inline void step(const Weight* w, const uint16_t* value, uint32_t keep) {
      Vec weight[kRows];
      for (int r = 0; r < kRows; ++r) weight[r] = set(w[r * kAttentionTile]);
      for (int c = 0; c < kColumns; ++c) {
        const Vec v = even_element(keep_bits(load_pairs(value + c * 2 * kLanes), keep));
        for (int r = 0; r < kRows; ++r) acc[r][c] = fma(weight[r], v, acc[r][c]);
      }
      for (int r = 0; r < kRows; ++r) weight[r] = set(w[r * kAttentionTile + 1]);
      for (int c = 0; c < kColumns; ++c) {
        const Vec v = odd_element(keep_bits(load_pairs(value + c * 2 * kLanes), keep));
        for (int r = 0; r < kRows; ++r) acc[r][c] = fma(weight[r], v, acc[r][c]);
      }
    }
  };
};

template <class Policy, int kRows>
inline void weigh_rows(int rows, const TilePages& tile, Range seen,
                       const typename Policy::Weight* w, int head_dim, float* acc) {
  if (rows == kRows) return Policy::template weigh<kRows>(tile, seen, w, head_dim, acc);
  if constexpr (kRows > 1) weigh_rows<Policy, kRows - 1>(rows, tile, seen, w, head_dim, acc);
}

template <class Policy, int kRows>
inline void score_rows(int rows, const TilePages& tile, typename Policy::Query q, int head_dim,
                       float* scores) {
  if (rows == kRows) {
    for (int s = tile.first; s < tile.last; ++s) {
      float* out = scores + s * kSubPage;
      if (tile.prefetch) {
        Policy::template score<kRows, true>(q, tile.page[s], tile.ahead_of_scores(s), head_dim,
                                            out);
      } else {
        Policy::template score<kRows, false>(q, tile.page[s], nullptr, head_dim, out);
      }
    }
  } else if constexpr (kRows > 1) {
    score_rows<Policy, kRows - 1>(rows, tile, q, head_dim, scores);
  }
}

/// Steps 2 and 3 for one row; turns scores [first, last) sub-pages into weights. With kAll the row
/// sees every token of them, which selects nothing away.
template <class Policy, bool kAll>
inline void soften(const TilePages& tile, Range seen, int head_dim, const float* scores,
                   typename Policy::Weight* weights, float* m, float* l, float* acc) {
  const int begin = tile.first * kSubPage, end = tile.last * kSubPage;
  const auto visible_or = [seen](int i, Vec v, float otherwise) {
    return kAll ? v : select(range_mask(i, seen.begin, seen.end), v, set(otherwise));
  };
  Vec top = set(kNegativeInfinity);
  for (int i = begin; i < end; i += kLanes) {
    top = max(top, visible_or(i, load(scores + i), kNegativeInfinity));
  }
  const float tile_max = reduce_max(top);
  if (tile_max > *m) {
    const float c = exp2_scalar(*m - tile_max);
    *m = tile_max;
    *l *= c;
    scale_row(acc, c, head_dim);
  }
  const Vec mv = set(*m);
  Vec sum = zero();
  for (int i = begin; i < end; i += kLanes) {
    const Vec p = visible_or(i, exp2(sub(load(scores + i), mv)), 0.f);
    sum = add(sum, Policy::store_weights(tile, i, head_dim, weights + i, p));
  }
  *l = *l + reduce_add(sum);
}

/// One tile for rows [row, row + rows), rows <= Policy::kRowGroup. `seen` is relative to the tile.
template <class Policy>
inline void attend_group(const AttentionParams& p, AttentionScratch& s, const TilePages& pages,
                         const Range* seen, int row, int rows, StateView state) {
  const int head_dim = p.kv.head_dim;
  int first = kAttentionTile, last = 0;
  for (int r = 0; r < rows; ++r) {
    if (seen[r].begin >= seen[r].end) continue;
    first = min_int(first, seen[r].begin);
    last = max_int(last, seen[r].end);
  }
  if (first >= last) return;
  TilePages tile = pages;
  tile.first = first / kSubPage;
  tile.last = (last + kSubPage - 1) / kSubPage;

  score_rows<Policy, Policy::kRowGroup>(rows, tile, Policy::queries(s, row, head_dim), head_dim,
                                        s.scores);
  typename Policy::Weight* weights = Policy::weights(s);
  for (int r = 0; r < rows; ++r) {
    if (seen[r].begin >= seen[r].end) continue;
    float* scores = s.scores + r * kAttentionTile;
    if (p.softcap > 0.f) {
      const Vec in = set(p.scale / p.softcap), out = set(p.softcap * kLog2E);
      for (int i = tile.first * kSubPage; i < tile.last * kSubPage; i += kLanes) {
        store(scores + i, mul(tanh(mul(load(scores + i), in)), out));
      }
    }
    const bool all = seen[r].begin <= tile.first * kSubPage && seen[r].end >= tile.last * kSubPage;
    const auto turn = all ? soften<Policy, true> : soften<Policy, false>;
    turn(tile, seen[r], head_dim, scores, weights + r * kAttentionTile, &state.m[row + r],
         &state.l[row + r], state.acc + (row + r) * head_dim);
  }
  for (int r = 0; r < rows;) {  // runs of rows with the same range: all rows inside the context, a
                                // token's at its edge
    int next = r + 1;
    while (next < rows && seen[next].begin == seen[r].begin && seen[next].end == seen[r].end)
      ++next;
    if (seen[r].begin < seen[r].end) {
      weigh_rows<Policy, Policy::kRowGroup>(next - r, tile, seen[r], weights + r * kAttentionTile,
                                            head_dim, state.acc + (row + r) * head_dim);
      tile.prefetch = false;
    }
    r = next;
  }
}

/// The sub-page that is read kPrefetchTiles tiles after `position` of a call that reads to `end`:
/// its own or, behind its last tile, one of p.next. Null when nothing is known to follow.
inline const uint8_t* page_ahead(const AttentionParams& p, int position, int end) {
  const int ahead = position + kPrefetchTiles * kAttentionTile;
  if (ahead < end) return sub_page(p.kv, p.block_table, p.kv_head, ahead);
  const int past_end = ahead - (end + kAttentionTile - 1) / kAttentionTile * kAttentionTile;
  const int there = p.next.begin - p.next.begin % kAttentionTile + past_end;
  if (there < p.next.begin - p.next.begin % kSubPage || there >= p.next.end) return nullptr;
  return sub_page(p.kv, p.next.block_table, p.next.kv_head, there);
}

/// Adds the tokens [span.begin, span.end) of one split to a fresh state of rows [row0, row0 + rows)
/// of the call.
template <class Policy>
inline void attend_split(const AttentionParams& p, AttentionScratch& s, int row0, int rows,
                         Range span, int end, StateView state) {
  const int groups = (rows + Policy::kRowGroup - 1) / Policy::kRowGroup;
  const int group_rows = (rows + groups - 1) / groups;
  for (int start = span.begin - span.begin % kAttentionTile; start < span.end;
       start += kAttentionTile) {
    TilePages pages;
    pages.page_bytes = p.kv.sub_page_bytes;
    pages.first = max_int(0, span.begin - start) / kSubPage;
    pages.last = (min_int(kAttentionTile, span.end - start) + kSubPage - 1) / kSubPage;
    for (int i = pages.first; i < pages.last; ++i) {
      pages.page[i] = sub_page(p.kv, p.block_table, p.kv_head, start + i * kSubPage);
    }
    for (int i = 0; i < kTileSubPages; ++i) {
      const uint8_t* ahead = page_ahead(p, start + i * kSubPage, end);
      pages.ahead[i] = ahead != nullptr ? ahead : pages.page[pages.first];
    }
    for (int row = 0; row < rows; row += group_rows) {
      const int count = min_int(group_rows, rows - row);
      Range seen[kMaxRowGroup];
      for (int r = 0; r < count; ++r) {
        const Range all = visible(p, row0 + row + r);
        seen[r].begin = max_int(0, all.begin - start);
        seen[r].end = min_int(kAttentionTile, all.end - start);
      }
      pages.prefetch = row == 0;
      attend_group<Policy>(p, s, pages, seen, row, count, state);
    }
  }
}

template <class Policy>
inline void attend(const AttentionParams& p) {
  AttentionScratch& s = *static_cast<AttentionScratch*>(p.scratch);
  const int head_dim = p.kv.head_dim;
  const float factor = p.softcap > 0.f ? 1.f : p.scale * kLog2E;
  const int total_rows = p.num_tokens * p.group;
  for (int row0 = 0; row0 < total_rows; row0 += kAttentionRows) {
    const int rows = min_int(kAttentionRows, total_rows - row0);
    for (int r = 0; r < rows; ++r) {
      const float* q =
          p.q + ((row0 + r) / p.group) * p.q_stride + ((row0 + r) % p.group) * head_dim;
      Policy::prepare(q, factor, head_dim, r, s);
    }
    const StateView out{p.m + row0, p.l + row0, p.acc + static_cast<int64_t>(row0) * head_dim};
    const StateView fresh{s.m, s.l, s.acc};
    clear_state(out, rows, head_dim);
    const Range all{visible(p, row0).begin, visible(p, row0 + rows - 1).end};
    const int end = min_int(all.end, p.split_end * kAttentionSplit);
    bool empty = true;
    for (int split = p.split_begin; split < p.split_end; ++split) {
      const Range span{max_int(all.begin, split * kAttentionSplit),
                       min_int(all.end, (split + 1) * kAttentionSplit)};
      if (span.begin >= span.end) continue;
      if (empty) {  // merge(nothing, state) is the state
        attend_split<Policy>(p, s, row0, rows, span, end, out);
        empty = false;
        continue;
      }
      clear_state(fresh, rows, head_dim);
      attend_split<Policy>(p, s, row0, rows, span, end, fresh);
      for (int r = 0; r < rows; ++r) {
        merge_state(&out.m[r], &out.l[r], out.acc + r * head_dim, fresh.m[r], fresh.l[r],
                    fresh.acc + r * head_dim, head_dim);
      }
    }
  }
}

void attention_finish(const AttentionFinishParams& p) {
  const int head_dim = p.head_dim;
  for (int row = 0; row < p.rows; ++row) {
    float* out = p.out + (row / p.group) * p.out_stride + (row % p.group) * head_dim;
    float m = kNegativeInfinity, l = 0.f;
    for (int i = 0; i < head_dim; i += kLanes) store(out + i, zero());
    for (int state = 0; state < p.count; ++state) {
      const int64_t at = static_cast<int64_t>(state) * p.rows + row;
      merge_state(&m, &l, out, p.m[at], p.l[at], p.acc + at * head_dim, head_dim);
    }
    if (l != 0.f) scale_row(out, 1.f / l, head_dim);
  }
}

}  // namespace
}  // namespace sagellm::kernels
