// Where results go: the output, or the states of tokens that several pieces of work share, which
// whoever finishes last merges. Shared by all shapes of the kernel.
#pragma once

#include <cmath>

#include "sagellm/kernels/cuda/attention_params.h"
#include "sagellm/kernels/cuda/ptx.cuh"

namespace sagellm::kernels::cuda {

/// exp2 of scores goes through here: a row that has seen nothing keeps its maximum at -infinity.
SAGE_DEVICE float exponent_base(float maximum) { return maximum == -INFINITY ? 0.f : maximum; }
/// What the sum of a row divides by; a row that has seen nothing is zero.
SAGE_DEVICE float inverse_sum(float sum) { return sum > 0.f ? 1.f / sum : 0.f; }

/// Whether an item is all that its tokens see: no states. All tokens of an item are alike.
SAGE_DEVICE bool writes_output(const AttentionParams& p, const AttentionItem& item) {
  const int token = p.work.tokens[item.first_token];
  return p.work.state_begin[token] == p.work.state_begin[token + 1];
}
SAGE_DEVICE int token_of_row(const AttentionParams& p, const AttentionItem& item, int row) {
  return p.work.tokens[item.first_token + row / item.num_heads];
}
SAGE_DEVICE int head_of_row(const AttentionParams& p, const AttentionItem& item, int row) {
  return static_cast<int>(blockIdx.y) * p.group + item.first_head + row % item.num_heads;
}
SAGE_DEVICE int64_t state_row(const AttentionParams& p, const AttentionItem& item, int token,
                              int head) {
  return (int64_t{p.work.state_begin[token]} + item.split) * (p.kv.num_kv_heads * p.group) + head;
}

template <int kCount>
SAGE_DEVICE void write_output(const AttentionParams& p, FloatType type, int token, int head,
                              int dim, const float (&values)[kCount]) {
  uint16_t* to =
      static_cast<uint16_t*>(p.out) + token * p.out_stride + int64_t{head} * p.kv.head_dim + dim;
  uint32_t words[kCount / 2];
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    words[i] = type == FloatType::kBF16 ? pack_bf16(values[2 * i], values[2 * i + 1])
                                        : pack_f16(values[2 * i], values[2 * i + 1]);
  }
  if constexpr (kCount == 2) {
    *reinterpret_cast<uint32_t*>(to) = words[0];
  } else if constexpr (kCount == 4) {
    *reinterpret_cast<uint2*>(to) = uint2{words[0], words[1]};
  } else {
    static_assert(kCount == 8);
    *reinterpret_cast<uint4*>(to) = uint4{words[0], words[1], words[2], words[3]};
  }
}

/// Writes one row, of its four lanes: `pair(group, word)` gives two neighbouring numbers and
/// `dim_of(group, word)` their place, for groups of 16 dimensions. `type` is p.type.
template <int kDim, typename Pair, typename Dim>
SAGE_DEVICE void write_row(const AttentionParams& p, const AttentionItem& item, FloatType type,
                           int row, bool to_output, float maximum, float sum, float out_scale,
                           const Pair& pair, const Dim& dim_of) {
  const int token = token_of_row(p, item, row);
  const int head = head_of_row(p, item, row);
  const float factor = (to_output ? inverse_sum(sum) : 1.f) * out_scale;
  const int64_t state = to_output ? 0 : state_row(p, item, token, head);
  if (!to_output && lane_id() % 4 == 0) {
    p.states[2 * state] = maximum;
    p.states[2 * state + 1] = sum;
  }
  const auto each_pair = [&](const auto& write) {
#pragma unroll
    for (int group = 0; group < kDim / 16; ++group) {
#pragma unroll
      for (int word = 0; word < 2; ++word) {
        const int dim = dim_of(group, word);
        if (dim >= p.kv.head_dim) continue;
        float2 values = pair(group, word);
        values.x *= factor;
        values.y *= factor;
        write(dim, values);
      }
    }
  };
  if (to_output) {
    each_pair([&](int dim, float2 values) {
      write_output(p, type, token, head, dim, {values.x, values.y});
    });
  } else {
    each_pair([&](int dim, float2 values) {
      *reinterpret_cast<float2*>(p.accumulators + state * p.kv.head_dim + dim) = values;
    });
  }
}

/// Merges all states of a token, in the order of their splits: the same bits whoever does it.
template <int kThreads>
SAGE_DEVICE void merge_states(const AttentionParams& p, int token) {
  const int kv_head = static_cast<int>(blockIdx.y);
  const int head_dim = p.kv.head_dim;
  const int heads = p.kv.num_kv_heads * p.group;
  const int64_t first = p.work.state_begin[token];
  const int count = static_cast<int>(p.work.state_begin[token + 1] - first);
  for (int i = static_cast<int>(threadIdx.x) * 4; i < p.group * head_dim; i += kThreads * 4) {
    const int head = kv_head * p.group + i / head_dim;
    const int dim = i % head_dim;
    const float* states = p.states + 2 * (first * heads + head);
    const float* accumulators = p.accumulators + (first * heads + head) * head_dim + dim;
    float highest = -INFINITY;
    for (int s = 0; s < count; ++s) highest = fmaxf(highest, states[int64_t{2} * s * heads]);
    const float base = exponent_base(highest);
    float total = 0.f;
    float values[4] = {};
#pragma unroll 4
    for (int s = 0; s < count; ++s) {
      const float2 one = *reinterpret_cast<const float2*>(states + int64_t{2} * s * heads);
      const float4 acc =
          *reinterpret_cast<const float4*>(accumulators + int64_t{s} * heads * head_dim);
      const float weight = ex2(one.x - base);
      total = fmaf(one.y, weight, total);
      values[0] = fmaf(acc.x, weight, values[0]);
      values[1] = fmaf(acc.y, weight, values[1]);
      values[2] = fmaf(acc.z, weight, values[2]);
      values[3] = fmaf(acc.w, weight, values[3]);
    }
    const float factor = inverse_sum(total);
#pragma unroll
    for (int j = 0; j < 4; ++j) values[j] *= factor;
    write_output(p, p.type, token, head, dim, values);
  }
}

/// Merges the states of the tokens for which this block was the last to write one. For threads 0 ..
/// kThreads - 1, which meet in `sync`; `complete` is a word of shared memory for each token.
template <int kThreads, typename Sync>
SAGE_DEVICE void finish_tokens(const AttentionParams& p, const AttentionItem& item,
                               int32_t* complete, const Sync& sync) {
  threadfence();
  sync();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < item.num_tokens) {
    const int token = p.work.tokens[item.first_token + thread];
    const int states = p.work.state_begin[token + 1] - p.work.state_begin[token];
    int32_t* arrivals =
        p.arrivals + int64_t{token} * p.kv.num_kv_heads + static_cast<int>(blockIdx.y);
    const int arrived = atomic_add(arrivals, item.num_heads) + item.num_heads;
    complete[thread] = arrived == states * p.group;
    if (arrived == states * p.group) *arrivals = 0;  // ready for the next launch
    threadfence();
  }
  sync();
  for (int i = 0; i < item.num_tokens; ++i) {
    if (complete[i] != 0) merge_states<kThreads>(p, p.work.tokens[item.first_token + i]);
  }
}

}  // namespace sagellm::kernels::cuda
