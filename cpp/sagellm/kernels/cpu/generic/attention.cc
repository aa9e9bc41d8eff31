// Paged attention in plain C++, one query row at a time: the specification of the SIMD versions.
#include "attention.h"

#include "../kv_page.h"
#include "scalar_math.h"

namespace sagellm::kernels {
namespace {

constexpr float kNegativeInfinity = -__builtin_inff();

struct AttentionScratch {
  float q[kMaxHeadDim];
  float acc[kMaxHeadDim];
};

/// Online-softmax state of one row: m the largest score so far, l the sum of 2^(score - m), acc
/// that of 2^(...) v.
struct State {
  float m;
  float l;
  float* acc;
};

State empty_state(float* acc, int head_dim) {
  for (int d = 0; d < head_dim; ++d) acc[d] = 0.f;
  return {kNegativeInfinity, 0.f, acc};
}

/// a <- merge(a, b).
void merge(State& a, const State& b, int head_dim) {
  if (b.l == 0.f) return;
  if (a.l == 0.f) {
    a.m = b.m;
    a.l = b.l;
    for (int d = 0; d < head_dim; ++d) a.acc[d] = b.acc[d];
    return;
  }
  const float m = a.m > b.m ? a.m : b.m;
  const float ca = exp2(a.m - m), cb = exp2(b.m - m);
  a.m = m;
  a.l = a.l * ca + b.l * cb;
  for (int d = 0; d < head_dim; ++d) a.acc[d] = a.acc[d] * ca + b.acc[d] * cb;
}

/// Adds q.k to the scores of one sub-page. Tokens that no row sees may hold anything; nobody reads
/// their score.
void score_bf16(const uint8_t* page, const float* q, int head_dim, float* scores) {
  const uint16_t* key = bf16_keys(page);
  for (int i = 0; i < head_dim / 2; ++i, key += 2 * kSubPage) {
    for (int t = 0; t < kSubPage; ++t) {
      scores[t] += q[2 * i] * bf16_to_float(key[2 * t]);
      scores[t] += q[2 * i + 1] * bf16_to_float(key[2 * t + 1]);
    }
  }
}

void score_coded(const uint8_t* page, const float* q, int head_dim, float* scores) {
  const CodedPage coded = coded_page(page, head_dim);
  const int8_t* key = coded.keys;
  for (int i = 0; i < head_dim / 2; ++i, key += 2 * kSubPage) {
    for (int t = 0; t < kSubPage; ++t) {
      scores[t] += q[2 * i] * static_cast<float>(key[2 * t]);
      scores[t] += q[2 * i + 1] * static_cast<float>(key[2 * t + 1]);
    }
  }
  for (int t = 0; t < kSubPage; ++t) scores[t] *= coded.key_scales[t];
}

/// acc += weight * v of the token in `slot` of a sub-page.
void weigh(const KvView& kv, const uint8_t* page, int slot, float weight, float* acc) {
  const int head_dim = kv.head_dim, place = (slot / 2) * 2 * head_dim + slot % 2;
  if (kv.dtype == KvDtype::kBF16) {
    const uint16_t* value = bf16_values(page, head_dim) + place;
    for (int d = 0; d < head_dim; ++d) acc[d] += weight * bf16_to_float(value[2 * d]);
  } else {
    const CodedPage coded = coded_page(page, head_dim);
    const float scaled = weight * coded.value_scales[slot];
    for (int d = 0; d < head_dim; ++d) {
      acc[d] += scaled * static_cast<float>(coded.values[place + 2 * d]);
    }
  }
}

/// Folds the tokens [begin, end), all of one tile, into the state.
void add_tile(const AttentionParams& p, const float* q, int begin, int end, State& state) {
  const int head_dim = p.kv.head_dim;
  const int tile = begin - begin % kAttentionTile;
  float scores[kAttentionTile];
  const int first_page = begin - begin % kSubPage;
  for (int position = first_page; position < end; position += kSubPage) {
    const uint8_t* page = sub_page(p.kv, p.block_table, p.kv_head, position);
    float* s = scores + (position - tile);
    for (int t = 0; t < kSubPage; ++t) s[t] = 0.f;
    (p.kv.dtype == KvDtype::kBF16 ? score_bf16 : score_coded)(page, q, head_dim, s);
  }
  float tile_max = kNegativeInfinity;
  for (int t = begin - tile; t < end - tile; ++t) {
    if (p.softcap > 0.f) scores[t] = p.softcap * tanh(scores[t] / p.softcap) * kLog2E;
    tile_max = scores[t] > tile_max ? scores[t] : tile_max;
  }
  if (tile_max > state.m) {
    const float c = exp2(state.m - tile_max);
    state.m = tile_max;
    state.l *= c;
    for (int d = 0; d < head_dim; ++d) state.acc[d] *= c;
  }
  float sum = 0.f;
  for (int position = begin; position < end; ++position) {
    const float weight = exp2(scores[position - tile] - state.m);
    sum += weight;
    weigh(p.kv, sub_page(p.kv, p.block_table, p.kv_head, position), position % kSubPage, weight,
          state.acc);
  }
  state.l += sum;
}

void attend_row(const AttentionParams& p, int row, AttentionScratch& scratch) {
  const int head_dim = p.kv.head_dim;
  const int position = p.first_position + row / p.group;
  const int visible_begin = p.window > 0 && position >= p.window ? position - p.window + 1 : 0;
  const int visible_end = position + 1;

  const float factor =
      p.softcap > 0.f ? p.scale : p.scale * kLog2E;  // scores live in the base-2 domain
  const float* q = p.q + (row / p.group) * p.q_stride + (row % p.group) * head_dim;
  for (int d = 0; d < head_dim; ++d) scratch.q[d] = q[d] * factor;

  State total = empty_state(p.acc + static_cast<int64_t>(row) * head_dim, head_dim);
  for (int split = p.split_begin; split < p.split_end; ++split) {
    const int begin =
        visible_begin > split * kAttentionSplit ? visible_begin : split * kAttentionSplit;
    const int limit = (split + 1) * kAttentionSplit;
    const int end = visible_end < limit ? visible_end : limit;
    State state = empty_state(scratch.acc, head_dim);
    for (int at = begin; at < end;) {
      const int tile_end = at - at % kAttentionTile + kAttentionTile;
      add_tile(p, scratch.q, at, end < tile_end ? end : tile_end, state);
      at = tile_end;
    }
    merge(total, state, head_dim);
  }
  p.m[row] = total.m;
  p.l[row] = total.l;
}

void attention(const AttentionParams& p) {
  for (int row = 0; row < p.num_tokens * p.group; ++row) {
    attend_row(p, row, *static_cast<AttentionScratch*>(p.scratch));
  }
}

void attention_finish(const AttentionFinishParams& p) {
  for (int row = 0; row < p.rows; ++row) {
    State total = empty_state(p.out + (row / p.group) * p.out_stride + (row % p.group) * p.head_dim,
                              p.head_dim);
    for (int i = 0; i < p.count; ++i) {
      const int64_t at = static_cast<int64_t>(i) * p.rows + row;
      merge(total, {p.m[at], p.l[at], const_cast<float*>(p.acc) + at * p.head_dim}, p.head_dim);
    }
    if (total.l == 0.f) continue;
    const float factor = 1.f / total.l;
    for (int d = 0; d < p.head_dim; ++d) total.acc[d] *= factor;
  }
}

}  // namespace

void fill_attention_generic(KernelTable& table) {
  table.attention = attention;
  table.attention_finish = attention_finish;
  table.attention_scratch_bytes = sizeof(AttentionScratch);
}

}  // namespace sagellm::kernels
