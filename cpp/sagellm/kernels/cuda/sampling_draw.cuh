// Drawing a token by one block: the thresholds of top-k and top-p by bisecting the bits of floats,
// then the first id whose cumulative weight exceeds the drawn number.
#pragma once

#include "sagellm/kernels/cuda/sampling_logits.cuh"

namespace sagellm::kernels::cuda {

inline constexpr int kChooseThreads = 512;
inline constexpr int kChooseWarps = kChooseThreads / kWarpSize;

/// Unsigned numbers in the order of the floats; -0 and 0 are equal. The key of -inf is not 0.
SAGE_DEVICE uint32_t key_of(float x) {
  const uint32_t bits = float_to_bits(x + 0.f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
SAGE_DEVICE float value_of(uint32_t key) {
  return bits_to_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

/// The least preferred logit that survives: larger ones do, and equal ones up to its id.
struct Cut {
  uint32_t key = 0;
  int32_t id = 0x7fffffff;

  SAGE_DEVICE bool keeps(uint32_t other, int other_id) const {
    return other > key || (other == key && other_id <= id);
  }
};

/// Shared memory of the choosing block, before the keys of the chunks' largest logits.
struct ChooseScratch {
  uint64_t values[kChooseWarps];
  uint64_t found[2];
};

/// A row as the choosing block sees it.
struct RowState {
  const float* logits;
  uint32_t* chunk_keys;  // shared, [chunks]
  ChooseScratch* scratch;
  int vocab, chunks;
};

/// Calls body(chunk) in one warp for every chunk whose largest key is `lowest` or more.
template <typename Body>
SAGE_DEVICE void for_chunks(const RowState& s, uint32_t lowest, const Body& body) {
  for (int begin = warp_id() * kWarpSize; begin < s.chunks; begin += kChooseThreads) {
    const int mine = begin + lane_id();
    uint32_t active = ballot(mine < s.chunks && s.chunk_keys[mine] >= lowest);
    for (; active != 0; active &= active - 1) body(begin + __ffs(static_cast<int>(active)) - 1);
  }
}

/// Calls body(logit, key, id) for every logit of these chunks.
template <typename Body>
SAGE_DEVICE void for_logits(const RowState& s, uint32_t lowest, const Body& body) {
  for_chunks(s, lowest, [&](int chunk) {
    float x[kLaneLogits];
    load_logits(s.logits, s.vocab, chunk, x);
    const int first = chunk * kSamplingChunk + lane_id() * kLaneLogits;
#pragma unroll
    for (int i = 0; i < kLaneLogits; ++i) {
      if (first + i < s.vocab) body(x[i], key_of(x[i]), first + i);
    }
  });
}

/// What logits count for: their weight, or one each.
struct Measure {
  Weigher weigh;
  bool weighted;

  SAGE_DEVICE uint64_t operator()(float x) const { return weighted ? weigh(x) : 1; }
};

/// The largest key from `low` on such that the measure of all keys from it on is at least `target`,
/// which that of `low` must be; `above` becomes the measure of the keys behind it. Over the logits
/// that `cut` keeps, or over the chunks' largest.
SAGE_DEVICE uint32_t search(const RowState& s, bool over_chunks, uint32_t low, uint32_t high,
                            uint64_t target, const Cut& cut, const Measure& measure,
                            uint64_t& above) {
  above = 0;
#pragma unroll 1
  while (high - low > 1) {
    uint32_t pivots[3];
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      const auto part =
          static_cast<uint32_t>(uint64_t{high - low} * static_cast<uint32_t>(j + 1) / 4);
      pivots[j] = low + (part > 0 ? part : 1);
    }
    uint64_t sums[3] = {0, 0, 0};
    const auto add = [&](float x, uint32_t key, int id) {
      if (key < pivots[0] || !cut.keeps(key, id)) return;
      const uint64_t amount = measure(x);
#pragma unroll
      for (int j = 0; j < 3; ++j) sums[j] += key >= pivots[j] ? amount : 0;
    };
    if (over_chunks) {
      for (int i = static_cast<int>(threadIdx.x); i < s.chunks; i += kChooseThreads) {
        add(value_of(s.chunk_keys[i]), s.chunk_keys[i], 0);
      }
    } else {
      for_logits(s, pivots[0], add);
    }
#pragma unroll
    for (int j = 0; j < 3; ++j) sums[j] = block_reduce(sums[j], s.scratch->values, Sum());
#pragma unroll
    for (int j = 2; j >= 0; --j) {
      if (high <= pivots[j]) continue;
      if (sums[j] >= target) {
        if (low < pivots[j]) low = pivots[j];
        break;
      }
      high = pivots[j];
      above = sums[j];
    }
  }
  return low;
}

/// The id of tie number `rank` (from 1) at `key`, by ascending id; all ids when there are no more.
SAGE_DEVICE int32_t id_of_tie(const RowState& s, uint32_t key, uint64_t rank) {
  uint64_t ties = 0;
  for_logits(s, key, [&](float, uint32_t other, int) { ties += other == key ? 1 : 0; });
  ties = block_reduce(ties, s.scratch->values, Sum());
  if (ties <= rank) return 0x7fffffff;
  if (warp_id() == 0) {  // rare: one warp walks through the chunks
    uint64_t before = 0;
    for (int chunk = 0; chunk < s.chunks; ++chunk) {
      if (s.chunk_keys[chunk] < key) continue;
      float x[kLaneLogits];
      load_logits(s.logits, s.vocab, chunk, x);
      int count = 0;
#pragma unroll
      for (int i = 0; i < kLaneLogits; ++i) count += key_of(x[i]) == key ? 1 : 0;
      int inclusive = count;
#pragma unroll
      for (int delta = 1; delta < kWarpSize; delta *= 2) {
        const int left = shfl_up(inclusive, delta);
        if (lane_id() >= delta) inclusive += left;
      }
      uint64_t place = before + static_cast<uint64_t>(inclusive - count);
#pragma unroll
      for (int i = 0; i < kLaneLogits; ++i) {
        if (key_of(x[i]) != key) continue;
        if (++place == rank) {
          s.scratch->found[0] =
              static_cast<uint64_t>(chunk * kSamplingChunk + lane_id() * kLaneLogits + i);
        }
      }
      before += static_cast<uint64_t>(shfl(inclusive, kWarpSize - 1));
      if (before >= rank) break;
    }
  }
  sync_block();
  const auto id = static_cast<int32_t>(s.scratch->found[0]);
  sync_block();
  return id;
}

/// The smallest preferred set within `cut` whose measure reaches `target`, which that of `cut`
/// does.
SAGE_DEVICE Cut narrow(const RowState& s, uint32_t largest, const Cut& cut, uint64_t target,
                       const Measure& measure) {
  uint64_t above = 0;
  Cut narrowed;
  narrowed.key = cut.key;
  bool over_chunks = false;
  if (cut.key == 0) {  // the chunks' largest logits may bound the threshold from below
    uint64_t sum = 0;
    for (int i = static_cast<int>(threadIdx.x); i < s.chunks; i += kChooseThreads) {
      sum += measure(value_of(s.chunk_keys[i]));
    }
    over_chunks = block_reduce(sum, s.scratch->values, Sum()) >= target;
  }
#pragma unroll 1
  for (int stage = over_chunks ? 0 : 1; stage < 2; ++stage) {
    narrowed.key = search(s, stage == 0, narrowed.key, largest + 1, target, cut, measure, above);
  }
  const uint64_t each = measure(value_of(narrowed.key));  // 0 only where all of them are
  const uint64_t rank = each == 0 ? 1 : (target - above + each - 1) / each;
  narrowed.id = id_of_tie(s, narrowed.key, rank);
  if (narrowed.key == cut.key && narrowed.id > cut.id) narrowed.id = cut.id;
  return narrowed;
}

/// The largest integer not above u * total.
SAGE_DEVICE uint64_t scaled_down(uint64_t total, uint64_t uniform) {
  const uint64_t u = uniform << 11;  // of 2^64
  const uint64_t t0 = total & 0xffffffffu, t1 = total >> 32, u0 = u & 0xffffffffu, u1 = u >> 32;
  const uint64_t middle = t1 * u0 + (t0 * u0 >> 32);
  const uint64_t other = t0 * u1 + (middle & 0xffffffffu);
  return t1 * u1 + (middle >> 32) + (other >> 32);
}

/// Inclusive sums over the lanes.
SAGE_DEVICE uint64_t warp_scan(uint64_t value) {
#pragma unroll
  for (int delta = 1; delta < kWarpSize; delta *= 2) {
    const uint64_t left = shfl_up(value, delta);
    if (lane_id() >= delta) value += left;
  }
  return value;
}

/// The first id whose cumulative weight exceeds u * total, given the weights of the chunks.
SAGE_DEVICE int32_t draw_token(const RowState& s, const uint64_t* weights, const Cut& cut,
                               const Weigher& weigh, uint64_t uniform) {
  const int each = (s.chunks + kChooseThreads - 1) / kChooseThreads;
  const int begin = static_cast<int>(threadIdx.x) * each;
  uint64_t sum = 0;
  for (int i = begin; i < begin + each && i < s.chunks; ++i) sum += weights[i];
  const uint64_t inclusive = warp_scan(sum);
  if (lane_id() == kWarpSize - 1) s.scratch->values[warp_id()] = inclusive;
  sync_block();
  uint64_t before = inclusive - sum, total = 0;
  for (int warp = 0; warp < kChooseWarps; ++warp) {
    if (warp < warp_id()) before += s.scratch->values[warp];
    total += s.scratch->values[warp];
  }
  const uint64_t target = scaled_down(total, uniform);
  if (before <= target && target < before + sum) {  // one thread
    int chunk = begin;
    for (; before + weights[chunk] <= target; ++chunk) before += weights[chunk];
    s.scratch->found[0] = static_cast<uint64_t>(chunk);
    s.scratch->found[1] = target - before;
  }
  sync_block();
  const auto chunk = static_cast<int>(s.scratch->found[0]);
  const uint64_t rest = s.scratch->found[1];
  sync_block();
  if (warp_id() == 0) {
    float x[kLaneLogits];
    load_logits(s.logits, s.vocab, chunk, x);
    const int first = chunk * kSamplingChunk + lane_id() * kLaneLogits;
    uint64_t weight[kLaneLogits], mine = 0;
#pragma unroll
    for (int i = 0; i < kLaneLogits; ++i) {
      weight[i] = cut.keeps(key_of(x[i]), first + i) ? weigh(x[i]) : 0;
      mine += weight[i];
    }
    uint64_t cumulative = warp_scan(mine) - mine;
#pragma unroll
    for (int i = 0; i < kLaneLogits; ++i) {
      if (cumulative <= rest && rest < cumulative + weight[i]) {
        s.scratch->found[0] = static_cast<uint64_t>(first + i);
      }
      cumulative += weight[i];
    }
  }
  sync_block();
  const auto id = static_cast<int32_t>(s.scratch->found[0]);
  sync_block();
  return id;
}

/// What the survivors of a cut weigh; without one the chunks' weights are at hand.
SAGE_DEVICE uint64_t weight_of(const RowState& s, const Cut& cut, const Weigher& weigh,
                               const uint64_t* weights) {
  uint64_t total = 0;
  if (cut.key == 0) {
    for (int i = static_cast<int>(threadIdx.x); i < s.chunks; i += kChooseThreads) {
      total += weights[i];
    }
  } else {
    for_logits(s, cut.key, [&](float x, uint32_t key, int id) {
      if (cut.keeps(key, id)) total += weigh(x);
    });
  }
  return block_reduce(total, s.scratch->values, Sum());
}

SAGE_DEVICE int32_t draw(const RowState& s, const SamplingRow& row, float largest,
                         uint64_t* weights) {
  Weigher weigh{largest, 1.0 / row.temperature, row.min_p};
  if (!truncates(row, s.vocab)) return draw_token(s, weights, Cut(), weigh, row.uniform_bits);
  weigh.min_p = 0.0;
  Cut cut;
#pragma unroll 1
  for (int stage = 0; stage < 2; ++stage) {  // top-k, then top-p
    const bool weighted = stage == 1;
    uint64_t target = static_cast<uint64_t>(row.top_k);
    if (weighted) {
      if (row.top_p >= 1.0) continue;
      const uint64_t total = weight_of(s, cut, weigh, weights);
      target = static_cast<uint64_t>(ceil(row.top_p * static_cast<double>(total)));
      if (target == 0) target = 1;
    } else if (row.top_k <= 0 || row.top_k >= s.vocab) {
      continue;
    }
    cut = narrow(s, key_of(largest), cut, target, Measure{weigh, weighted});
  }
  weigh.min_p = row.min_p;
  for (int i = static_cast<int>(threadIdx.x); i < s.chunks; i += kChooseThreads) {
    if (s.chunk_keys[i] < cut.key) weights[i] = 0;
  }
  for_chunks(s, cut.key, [&](int chunk) {
    float x[kLaneLogits];
    load_logits(s.logits, s.vocab, chunk, x);
    const int first = chunk * kSamplingChunk + lane_id() * kLaneLogits;
    uint64_t sum = 0;
#pragma unroll
    for (int i = 0; i < kLaneLogits; ++i) {
      if (cut.keeps(key_of(x[i]), first + i)) sum += weigh(x[i]);
    }
    sum = warp_reduce(sum, Sum());
    if (lane_id() == 0) weights[chunk] = sum;
  });
  sync_block();
  return draw_token(s, weights, cut, weigh, row.uniform_bits);
}

}  // namespace sagellm::kernels::cuda
