#include "sagellm/kernels/cuda/sampling_draw.cuh"

namespace sagellm::kernels::cuda {

namespace {

constexpr int kScanThreads = 128;   // one chunk per warp
constexpr int kWeighThreads = 128;  // 8 chunks per warp
constexpr int kWeighChunks = 32;    // of a block

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

// ---------------------------------------------------------------------------------------- choosing
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

// ---------------------------------------------------------------------------------------- counting
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
    take_sampled_kernel(const __grid_constant__ TakeSampledParams p) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= p.num_tokens || p.sources[i] < 0) return;
  const SampledToken& sampled = p.sampled[p.sources[i]];
  p.token_ids[i] = sampled.status == SampleStatus::kChosen ? sampled.token_id : 0;
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

void take_sampled(const TakeSampledParams& p, void* stream) {
  if (p.num_tokens == 0) return;
  launch(take_sampled_kernel, Grid{static_cast<uint32_t>((p.num_tokens + 127) / 128)}, 128, 0,
         stream, p);
}

}  // namespace sagellm::kernels::cuda
