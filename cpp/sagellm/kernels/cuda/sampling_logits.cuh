// What the sampling kernels share: logits by chunk, the workspace, reductions, weights.
#pragma once

#include <cmath>

#include "sagellm/kernels/cuda/ptx.cuh"
#include "sagellm/kernels/cuda/sampling.h"

namespace sagellm::kernels::cuda {

inline constexpr int kLaneLogits = kSamplingChunk / kWarpSize;
inline constexpr uint32_t kInfinityBits = 0x7f800000u;
inline constexpr double kWeightOne = 17592186044416.0;  // 2^44

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

}  // namespace sagellm::kernels::cuda
