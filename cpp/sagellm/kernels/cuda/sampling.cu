#include <cmath>

#include "sagellm/kernels/cuda/ptx.cuh"
#include "sagellm/kernels/cuda/sampling.h"

namespace sagellm::kernels::cuda {

namespace {

constexpr int kScanThreads = 128;   // one chunk per warp
constexpr int kWeighThreads = 128;  // 8 chunks per warp
constexpr int kWeighChunks = 32;    // of a block
constexpr int kChooseThreads = 512;
constexpr int kChooseWarps = kChooseThreads / kWarpSize;
constexpr int kLaneLogits = kSamplingChunk / kWarpSize;
constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr double kWeightOne = 17592186044416.0;  // 2^44

SAGE_DEVICE float negative_infinity() { return bits_to_float(0xff800000u); }
SAGE_DEVICE float positive_infinity() { return bits_to_float(kInfinityBits); }
SAGE_DEVICE bool is_finite(float x) { return (float_to_bits(x) & kInfinityBits) != kInfinityBits; }

/// Where the parts of the workspace lie; each is [row][chunk].
struct Workspace {
  uint64_t* weights;
  float* raw_largest;  // infinite when a logit of the chunk is not finite
  float* largest;      // of the adjusted logits
  float* sums;         // of exp(logit - raw_largest)
};
SAGE_DEVICE Workspace workspace_of(const SamplingParams& p, int row) {
  const int64_t chunks = sampling_chunks(p.vocab);
  const int64_t count = chunks * p.num_rows;
  auto* floats = reinterpret_cast<float*>(p.workspace + count * 8) + row * chunks;
  return {reinterpret_cast<uint64_t*>(p.workspace) + row * chunks, floats, floats + count,
          floats + 2 * count};
}

/// The logits that a row chooses from.
SAGE_DEVICE const float* logits_of(const SamplingParams& p, const SamplingRow& row, int index) {
  return row.adjusted != nullptr ? row.adjusted : p.logits + index * p.logits_stride;
}

/// This lane's four logits of a chunk; -inf behind the vocabulary.
SAGE_DEVICE void load_logits(const float* logits, int vocab, int chunk, float (&x)[kLaneLogits]) {
  const int first = chunk * kSamplingChunk + lane_id() * kLaneLogits;
  if (first + kLaneLogits <= vocab) {
    const float4 four = *reinterpret_cast<const float4*>(logits + first);
    x[0] = four.x;
    x[1] = four.y;
    x[2] = four.z;
    x[3] = four.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < kLaneLogits; ++i) {
    x[i] = first + i < vocab ? logits[first + i] : negative_infinity();
  }
}

SAGE_DEVICE float max4(const float (&x)[kLaneLogits]) {
  return fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
}

// ------------------------------------------------------------------------------------------- scan
/// Adds the biases of this chunk's tokens, in the order of the list.
SAGE_DEVICE void add_bias(const SamplingRow& row, int first, float (&x)[kLaneLogits]) {
  const int chunk = first / kSamplingChunk;
  const int lane = lane_id();
  for (int begin = 0; begin < row.num_bias; begin += kWarpSize) {
    const int id = begin + lane < row.num_bias ? row.bias_ids[begin + lane] : -1;
    uint32_t hits = ballot(id >= 0 && id / kSamplingChunk == chunk);
    for (; hits != 0; hits &= hits - 1) {
      const int entry = begin + __ffs(static_cast<int>(hits)) - 1;
      const int place = row.bias_ids[entry] - first;
#pragma unroll
      for (int i = 0; i < kLaneLogits; ++i) {
        if (place == i) x[i] += row.bias_values[entry];
      }
    }
  }
}

SAGE_DEVICE float penalized(float x, uint32_t count, const SamplingRow& row) {
  if (count == 0) return x;
  x = x > 0.f ? __fdiv_rn(x, row.repetition_penalty) : x * row.repetition_penalty;
  if (count < 2) return x;
  const double penalty =
      static_cast<double>(row.presence_penalty) +
      static_cast<double>(row.frequency_penalty) * static_cast<double>(count >> 1);
  return static_cast<float>(static_cast<double>(x) - penalty);
}

__global__ void __launch_bounds__(kScanThreads)
    scan_kernel(const __grid_constant__ SamplingParams p) {
  const int chunk = static_cast<int>(blockIdx.x) * (kScanThreads / kWarpSize) + warp_id();
  const int index = static_cast<int>(blockIdx.y);
  if (chunk >= sampling_chunks(p.vocab)) return;
  const SamplingRow& row = p.rows[index];
  const Workspace work = workspace_of(p, index);
  const int first = chunk * kSamplingChunk + lane_id() * kLaneLogits;
  float x[kLaneLogits];
  load_logits(p.logits + index * p.logits_stride, p.vocab, chunk, x);
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kLaneLogits; ++i)
    finite = finite && (first + i >= p.vocab || is_finite(x[i]));
  const bool all_finite = ballot(!finite) == 0;
  const float largest = warp_max(max4(x));
  if (lane_id() == 0) work.raw_largest[chunk] = all_finite ? largest : positive_infinity();
  if (!all_finite) return;
  if (row.num_logprobs >= 0) {
    float sum = 0.f;
#pragma unroll
    for (const float v : x) sum += expf(v - largest);
    sum = warp_sum(sum);
    if (lane_id() == 0) work.sums[chunk] = sum;
  }
  if (row.adjusted == nullptr) {
    if (lane_id() == 0) work.largest[chunk] = largest;
    return;
  }
  add_bias(row, first, x);
#pragma unroll
  for (int i = 0; i < kLaneLogits; ++i) {
    const int id = first + i;
    if (id >= p.vocab) continue;
    if (row.counts != nullptr) x[i] = penalized(x[i], row.counts[id], row);
    const bool allowed = row.allowed == nullptr || (row.allowed[id / 32] >> (id % 32) & 1u) != 0;
    if (!allowed) x[i] = negative_infinity();
    row.adjusted[id] = x[i];
  }
  const float adjusted = warp_max(max4(x));
  if (lane_id() == 0) work.largest[chunk] = adjusted;
}

// ---------------------------------------------------------------------------------------- weighing
struct Sum {
  template <typename T>
  SAGE_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};
struct Largest {
  template <typename T>
  SAGE_DEVICE T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

template <typename T, typename Op>
SAGE_DEVICE T warp_reduce(T value, Op op) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value = op(value, shfl_xor(value, mask));
  return value;
}

/// Over the block, the same in all threads; `scratch` has a T per warp.
template <typename T, typename Op>
SAGE_DEVICE T block_reduce(T value, T* scratch, Op op) {
  value = warp_reduce(value, op);
  if (lane_id() == 0) scratch[warp_id()] = value;
  sync_block();
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  T result = scratch[0];
  for (int warp = 1; warp < warps; ++warp) result = op(result, scratch[warp]);
  sync_block();  // scratch is free again
  return result;
}

/// What a logit weighs, in multiples of 2^-44 of the largest; 0 below `min_p`.
struct Weigher {
  double largest, inverse_temperature, min_p;

  SAGE_DEVICE uint64_t operator()(float x) const {
    const double scaled = (static_cast<double>(x) - largest) * inverse_temperature;
    if (!(scaled > -32.0)) return 0;  // rounds to 0, like -inf
    const double weight = exp(scaled);
    return weight >= min_p ? static_cast<uint64_t>(weight * kWeightOne + 0.5) : 0;
  }
};

SAGE_DEVICE bool truncates(const SamplingRow& row, int vocab) {
  return row.top_p < 1.0 || (row.top_k > 0 && row.top_k < vocab);
}

__global__ void __launch_bounds__(kWeighThreads)
    weigh_kernel(const __grid_constant__ SamplingParams p) {
  const int index = static_cast<int>(blockIdx.y);
  const SamplingRow& row = p.rows[index];
  if (row.temperature == 0.0 || row.forced_token >= 0) return;
  const int chunks = sampling_chunks(p.vocab);
  const Workspace work = workspace_of(p, index);
  float largest = negative_infinity();
  bool finite = true;
  for (int chunk = static_cast<int>(threadIdx.x); chunk < chunks; chunk += kWeighThreads) {
    finite = finite && is_finite(work.raw_largest[chunk]);
    largest = fmaxf(largest, finite ? work.largest[chunk] : positive_infinity());
  }
  largest = block_reduce(largest, shared_memory<float>(), Largest());
  if (!is_finite(largest)) return;  // an error, which the next kernel reports
  // Without other truncation min-p acts here.
  const Weigher weigh{largest, 1.0 / row.temperature, truncates(row, p.vocab) ? 0.0 : row.min_p};
  const float* logits = logits_of(p, row, index);
  for (int i = warp_id(); i < kWeighChunks; i += kWeighThreads / kWarpSize) {
    const int chunk = static_cast<int>(blockIdx.x) * kWeighChunks + i;
    if (chunk >= chunks) return;
    float x[kLaneLogits];
    load_logits(logits, p.vocab, chunk, x);
    const uint64_t sum =
        warp_reduce((weigh(x[0]) + weigh(x[1])) + (weigh(x[2]) + weigh(x[3])), Sum());
    if (lane_id() == 0) work.weights[chunk] = sum;
  }
}

// ---------------------------------------------------------------------------------------
// thresholds
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

// -----------------------------------------------------------------------------------------
// choosing
/// A key and a place, ordered by the key and then by the lower place.
SAGE_DEVICE uint64_t ranked(uint32_t key, int place) {
  return uint64_t{key} << 32 | (0xffffffffu - static_cast<uint32_t>(place));
}
SAGE_DEVICE int place_of(uint64_t rank) {
  return static_cast<int>(0xffffffffu - static_cast<uint32_t>(rank));
}

/// The preferred chunk by its largest key.
SAGE_DEVICE uint64_t best_chunk(const RowState& s) {
  uint64_t best = 0;
  for (int i = static_cast<int>(threadIdx.x); i < s.chunks; i += kChooseThreads) {
    best = Largest()(best, ranked(s.chunk_keys[i], i));
  }
  return block_reduce(best, s.scratch->values, Largest());
}

/// The preferred logit of a chunk among those less preferred than `last`; for one warp. `next`
/// becomes the key of the one after it, 0 when there is none.
SAGE_DEVICE uint64_t best_of_chunk(const RowState& s, int chunk, uint64_t last, uint32_t& next) {
  float x[kLaneLogits];
  load_logits(s.logits, s.vocab, chunk, x);
  const int first = chunk * kSamplingChunk + lane_id() * kLaneLogits;
  uint64_t ranks[kLaneLogits], best = 0;
#pragma unroll
  for (int i = 0; i < kLaneLogits; ++i) {
    ranks[i] = first + i < s.vocab ? ranked(key_of(x[i]), first + i) : 0;
    if (ranks[i] < last) best = Largest()(best, ranks[i]);
  }
  best = warp_reduce(best, Largest());
  uint64_t second = 0;
#pragma unroll
  for (int i = 0; i < kLaneLogits; ++i) {
    if (ranks[i] < best) second = Largest()(second, ranks[i]);
  }
  next = static_cast<uint32_t>(warp_reduce(second, Largest()) >> 32);
  return best;
}

SAGE_DEVICE int32_t argmax(const RowState& s) {
  const int chunk = place_of(best_chunk(s));
  uint32_t next = 0;
  const uint64_t best = best_of_chunk(s, chunk, ~uint64_t{0}, next);  // the same in every warp
  return place_of(best);
}

/// Loads the keys of the chunks' largest logits; returns the largest of all.
SAGE_DEVICE float load_keys(const RowState& s, const float* largest) {
  float best = negative_infinity();
  for (int i = static_cast<int>(threadIdx.x); i < s.chunks; i += kChooseThreads) {
    best = fmaxf(best, largest[i]);
    s.chunk_keys[i] = key_of(largest[i]);
  }
  return block_reduce(best, reinterpret_cast<float*>(s.scratch->values), Largest());
}

SAGE_DEVICE void report_logprobs(const RowState& s, const SamplingRow& row, const Workspace& work,
                                 SampledToken& out, int32_t token) {
  const double largest = static_cast<double>(load_keys(s, work.raw_largest));
  double sum = 0.0;
  for (int i = static_cast<int>(threadIdx.x); i < s.chunks; i += kChooseThreads) {
    sum +=
        static_cast<double>(work.sums[i]) * exp(static_cast<double>(work.raw_largest[i]) - largest);
  }
  sum = block_reduce(sum, reinterpret_cast<double*>(s.scratch->values), Sum());
  const double normalizer = largest + log(sum);
  if (threadIdx.x == 0) out.logprob = static_cast<double>(s.logits[token]) - normalizer;
  uint64_t last = ~uint64_t{0};
  const int count = min(min(row.num_logprobs, s.vocab), kMaxTopLogprobs);
  for (int i = 0; i < count; ++i) {
    const int chunk = place_of(best_chunk(s));
    uint32_t next = 0;
    last = best_of_chunk(s, chunk, last, next);  // the same in every warp
    if (threadIdx.x == 0) {
      s.chunk_keys[chunk] = next;
      out.top_ids[i] = place_of(last);
      out.top_logprobs[i] =
          static_cast<double>(value_of(static_cast<uint32_t>(last >> 32))) - normalizer;
    }
    sync_block();
  }
}

__global__ void __launch_bounds__(kChooseThreads)
    choose_kernel(const __grid_constant__ SamplingParams p) {
  const int index = static_cast<int>(blockIdx.x);
  const SamplingRow& row = p.rows[index];
  SampledToken& out = p.out[index];
  const Workspace work = workspace_of(p, index);
  RowState s;
  s.scratch = shared_memory<ChooseScratch>();
  s.chunk_keys = reinterpret_cast<uint32_t*>(s.scratch + 1);
  s.vocab = p.vocab;
  s.chunks = sampling_chunks(p.vocab);
  s.logits = logits_of(p, row, index);
  const auto fail = [&](SampleStatus status) {
    if (threadIdx.x != 0) return;
    out.token_id = -1;
    out.status = status;
  };
  if (load_keys(s, work.raw_largest) == positive_infinity()) return fail(SampleStatus::kNotFinite);
  int32_t token = row.forced_token;
  if (token < 0) {
    const float largest = load_keys(s, work.largest);
    if (largest == negative_infinity()) return fail(SampleStatus::kNoneAllowed);
    if (!is_finite(largest)) return fail(SampleStatus::kAdjustedNotFinite);
    token = row.temperature == 0.0 ? argmax(s) : draw(s, row, largest, work.weights);
  }
  if (threadIdx.x == 0) {
    out.token_id = token;
    out.status = SampleStatus::kChosen;
  }
  if (row.num_logprobs < 0) return;
  s.logits = p.logits + index * p.logits_stride;
  report_logprobs(s, row, work, out, token);
}

// -----------------------------------------------------------------------------------------
// counting
__global__ void __launch_bounds__(128)
    count_tokens_kernel(const __grid_constant__ CountTokensParams p) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= p.num_ids) return;
  uint32_t* count = p.counts + p.ids[i];
  if (p.prompt) {
    atomic_max(count, *count | 1u);  // nothing else of the word changes in this launch
  } else {
    atomic_add(count, 2u);
  }
}

__global__ void __launch_bounds__(128)
    count_sampled_kernel(const __grid_constant__ CountSampledParams p) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= p.num_rows) return;
  const SampledToken& sampled = p.sampled[i];
  if (p.rows[i].counts == nullptr || sampled.status != SampleStatus::kChosen) return;
  atomic_add(const_cast<uint32_t*>(p.rows[i].counts) + sampled.token_id, 2u);
}

}  // namespace

void sample_tokens(const SamplingParams& p, void* stream) {
  if (p.num_rows == 0) return;
  const int chunks = sampling_chunks(p.vocab);
  const auto rows = static_cast<uint32_t>(p.num_rows);
  const auto blocks = [chunks](int each) {
    return static_cast<uint32_t>((chunks + each - 1) / each);
  };
  launch(scan_kernel, Grid{blocks(kScanThreads / kWarpSize), rows}, kScanThreads, 0, stream, p);
  launch(weigh_kernel, Grid{blocks(kWeighChunks), rows}, kWeighThreads,
         kWeighThreads / kWarpSize * sizeof(float), stream, p);
  launch(choose_kernel, Grid{rows}, kChooseThreads,
         sizeof(ChooseScratch) + sizeof(uint32_t) * static_cast<size_t>(chunks), stream, p);
}

void count_tokens(const CountTokensParams& p, void* stream) {
  if (p.num_ids == 0) return;
  launch(count_tokens_kernel, Grid{static_cast<uint32_t>((p.num_ids + 127) / 128)}, 128, 0, stream,
         p);
}

void count_sampled(const CountSampledParams& p, void* stream) {
  if (p.num_rows == 0) return;
  launch(count_sampled_kernel, Grid{static_cast<uint32_t>((p.num_rows + 127) / 128)}, 128, 0,
         stream, p);
}

}  // namespace sagellm::kernels::cuda
