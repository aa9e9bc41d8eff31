// Paged attention, in two shapes of one kernel.
//
// Narrow (decode): a tile has 16 rows, the query heads of one kv head and of up to 16 / group
// tokens. Each of the four warps takes 16 tokens of every step of 64, copies them for itself and
// keeps (m, l, acc) of its own; nothing waits for the block until the end, where the four states
// merge.
//
// Wide (prefill, shared prefixes): a tile has 64 or 128 rows; each warp takes a quarter of the rows
// and all tokens of a step (32 or 64), which the block copies together.
//
// Copies run ahead through a ring of p.ring entries; an entry is K or V of one step. The grid of
// steps is absolute, and a step in which a row sees nothing leaves its state exactly as it was: a
// row's bits depend on its own tokens and on the splits alone.
#pragma once

#include "sagellm/kernels/cuda/attention_launch.h"
#include "sagellm/kernels/cuda/attention_loader.cuh"
#include "sagellm/kernels/cuda/attention_output.cuh"

namespace sagellm::kernels::cuda {

template <int kDim, KvType kType, AttentionKernel kKernel>
class AttentionBlock : AttentionLoader<kDim, kType, kKernel> {
  using Loader = AttentionLoader<kDim, kType, kKernel>;
  using Loader::all_begin_;
  using Loader::all_end_;
  using Loader::any_end_;
  using Loader::complete;
  using Loader::end_of_row;
  using Loader::first_row;
  using Loader::first_step;
  using Loader::kTiles;
  using Loader::kTokens;
  using Loader::kv_begin_;
  using Loader::kv_end_;
  using Loader::next_entry;
  using Loader::num_entries;
  using Loader::p_;
  using Loader::query_rows;
  using Loader::ring;
  using Loader::row_of;
  using Loader::start;
  using Loader::sums;
  using Loader::this_item;
  using Loader::writes_output_;
  using typename Loader::Layout;
  using typename Loader::Shape;
  using typename Loader::Traits;
  using Mma = typename Traits::Mma;
  static constexpr float kLog2E = 1.4426950408889634f;

 public:
  SAGE_DEVICE explicit AttentionBlock(const AttentionParams& p) : Loader(p) {}

  SAGE_DEVICE void run(int item) {
    start(item);
    float acc[kTiles][kDim / 8][4] = {};
    float maximum[kTiles][2];
    float sum[kTiles][2];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      maximum[i][0] = maximum[i][1] = -INFINITY;
      sum[i][0] = sum[i][1] = 0.f;
    }
    if constexpr (Shape::kQueryInRegisters) {
      uint32_t fragments[kDim / 16][4];
#pragma unroll
      for (int step = 0; step < kDim / 16; ++step) {
        load_query<kDim, kType>(fragments[step], query_rows(), step);
      }
      attend(acc, maximum, sum, [&](uint32_t(&a)[4], int, int step) {
#pragma unroll
        for (int w = 0; w < 4; ++w) a[w] = fragments[step][w];
      });
    } else {
      const std::byte* q = query_rows() + first_row() * Layout::kQueryStride;
      attend(acc, maximum, sum, [&](uint32_t(&a)[4], int tile, int step) {
        load_query<kDim, kType>(a, q + tile * 16 * Layout::kQueryStride, step);
      });
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) sum[i][half] = warp_sum<4>(sum[i][half]);
    }
    cp_async_wait<0>();  // the ring's trailing groups are empty; its memory is used again

    if constexpr (Shape::kWide) {
      finish_rows(acc, maximum, sum);
    } else {
      merge_warps(acc, maximum, sum);
    }
    if (!writes_output_) {
      finish_tokens<kAttentionThreads>(p_, this_item(), complete(), [] { sync_block(); });
    }
    sync_block();  // before the next item overwrites shared memory
  }

 private:
  // ----------------------------------------------------------------------------------- computing
  template <typename Query>
  SAGE_DEVICE void attend(float (&acc)[kTiles][kDim / 8][4], float (&maximum)[kTiles][2],
                          float (&sum)[kTiles][2], const Query& query) {
    for (int entry = 0; entry < num_entries(); entry += 2) {
      const int first_token =
          (first_step() + entry / 2) * Shape::kStep + (Shape::kWide ? 0 : warp_id() * 16);
      const bool seen = first_token < any_end_ && first_token + kTokens > kv_begin_;
      float s[kTiles][kTokens / 8][4] = {};
      const std::byte* keys = next_entry(entry);
      if (seen) {
        multiply_keys<kDim, kType, kTiles, kTokens>(s, keys, query);
        scale_scores(s, keys + kTokens * Layout::kRowStride);
        if (first_token < all_begin_ || first_token + kTokens > all_end_) mask(s, first_token);
        softmax(s, acc, maximum, sum);
      }
      const std::byte* values = next_entry(entry + 1);
      if (seen) {
#pragma unroll
        for (int t = 0; t < kTokens / 16; ++t) {
          uint32_t fragments[kTiles][4];
          pack_probabilities(fragments, s, t, values + kTokens * Layout::kRowStride);
          multiply_values<kDim, kType, kTiles>(acc, fragments,
                                               values + t * 16 * Layout::kRowStride);
        }
      }
    }
  }

  // What softmax() cannot fold into its one multiplication.
  SAGE_DEVICE void scale_scores(float (&s)[kTiles][kTokens / 8][4], const std::byte* scales) const {
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
      float2 token_scale{1.f, 1.f};
      if constexpr (KvTraits<kType>::kHasScales) {
        token_scale = reinterpret_cast<const float2*>(scales)[n * 4 + lane_id() % 4];
        token_scale.x *= Traits::kKScale;
        token_scale.y *= Traits::kKScale;
      }
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if constexpr (KvTraits<kType>::kHasScales)
            s[i][n][j] *= j % 2 == 0 ? token_scale.x : token_scale.y;
        }
      }
    }
    if (p_.softcap <= 0.f) return;
    const float inward = 2.f * kLog2E * p_.scale / p_.softcap;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {  // softcap * tanh, in units of softcap
          s[i][n][j] = 1.f - 2.f * reciprocal(1.f + ex2(s[i][n][j] * inward));
        }
      }
    }
  }

  SAGE_DEVICE void mask(float (&s)[kTiles][kTokens / 8][4], int first_token) const {
    const int window = p_.window > 0 ? p_.window : INT32_MAX;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row_end = *end_of_row(row_of(i, half));
        const int begin = max(kv_begin_, row_end - window) - first_token - lane_id() % 4 * 2;
        const int end = min(kv_end_, row_end) - first_token - lane_id() % 4 * 2;
#pragma unroll
        for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int token = n * 8 + j;
            float& score = s[i][n][2 * half + j];
            score = token >= begin && token < end ? score : -INFINITY;
          }
        }
      }
    }
  }

  // Scores become exp2(score - maximum); what was summed under a lower maximum shrinks.
  SAGE_DEVICE void softmax(float (&s)[kTiles][kTokens / 8][4], float (&acc)[kTiles][kDim / 8][4],
                           float (&maximum)[kTiles][2], float (&sum)[kTiles][2]) const {
    const float factor = (p_.softcap > 0.f ? p_.softcap : p_.scale) * kLog2E;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      float shrink[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float highest = -INFINITY;
#pragma unroll
        for (int n = 0; n < kTokens / 8; ++n) {
          highest = fmaxf(highest, fmaxf(s[i][n][2 * half], s[i][n][2 * half + 1]));
        }
        highest = warp_max<4>(highest);
        const float now = fmaxf(maximum[i][half], highest * factor);
        const float base = exponent_base(now);
        shrink[half] = ex2(maximum[i][half] - base);
        maximum[i][half] = now;
        float added = 0.f;
#pragma unroll
        for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
          for (int j = 2 * half; j < 2 * half + 2; ++j) {
            s[i][n][j] = ex2(fmaf(s[i][n][j], factor, -base));
            added += s[i][n][j];
          }
        }
        sum[i][half] = fmaf(sum[i][half], shrink[half], added);
      }
      // Multiplying by exactly 1 changes nothing: most steps find no higher score.
      if (ballot(shrink[0] != 1.f || shrink[1] != 1.f) != 0) {
#pragma unroll
        for (int d = 0; d < kDim / 8; ++d) {
          acc[i][d][0] *= shrink[0];
          acc[i][d][1] *= shrink[0];
          acc[i][d][2] *= shrink[1];
          acc[i][d][3] *= shrink[1];
        }
      }
    }
  }

  // Probabilities of 16 tokens as the A operand of P * V, with the scales of V in them.
  SAGE_DEVICE void pack_probabilities(uint32_t (&fragments)[kTiles][4],
                                      float (&s)[kTiles][kTokens / 8][4], int t,
                                      const std::byte* scales) const {
    float2 token_scale[2];
    if constexpr (KvTraits<kType>::kHasScales) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        token_scale[k] = reinterpret_cast<const float2*>(scales)[(2 * t + k) * 4 + lane_id() % 4];
        token_scale[k].x *= Traits::kPScale;
        token_scale[k].y *= Traits::kPScale;
      }
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        float(&p)[4] = s[i][2 * t + k];
        if constexpr (KvTraits<kType>::kHasScales) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {  // the scale of a masked token may be anything
            const float scale = j % 2 == 0 ? token_scale[k].x : token_scale[k].y;
            p[j] = p[j] == 0.f ? 0.f : p[j] * scale;
          }
        }
        fragments[i][2 * k] = pack2<Mma>(p[0], p[1]);
        fragments[i][2 * k + 1] = pack2<Mma>(p[2], p[3]);
      }
    }
  }

  // ----------------------------------------------------------------------------------- finishing
  // Wide: every lane writes what it holds.
  SAGE_DEVICE void finish_rows(const float (&acc)[kTiles][kDim / 8][4],
                               const float (&maximum)[kTiles][2], const float (&sum)[kTiles][2]) {
    const int rows = this_item().num_tokens * this_item().num_heads;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(i, half);
        if (row >= rows) continue;
        write_row<kDim>(
            p_, this_item(), p_.type, row, writes_output_, maximum[i][half], sum[i][half],
            Traits::kOutScale,
            [&](int group, int word) {
              return accumulator_pair<kType>(acc[i][2 * group], acc[i][2 * group + 1], 2 * half,
                                             word);
            },
            [](int group, int word) { return accumulator_dim<kType>(group, word); });
      }
    }
  }

  // Narrow: the states of the four warps, merged in their order.
  SAGE_DEVICE void merge_warps(const float (&acc)[kTiles][kDim / 8][4],
                               const float (&maximum)[kTiles][2], const float (&sum)[kTiles][2]) {
    sync_block();  // all warps have left the ring
    float* merge = reinterpret_cast<float*>(ring());
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_id() * kNarrowRows + half * 8 + lane_id() / 4;
      if (lane_id() % 4 == 0) sums()[row] = float2{maximum[0][half], sum[0][half]};
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
#pragma unroll
        for (int word = 0; word < 2; ++word) {
          *reinterpret_cast<float2*>(merge + row * Shape::kMergeStride +
                                     accumulator_dim<kType>(d, word)) =
              accumulator_pair<kType>(acc[0][2 * d], acc[0][2 * d + 1], 2 * half, word);
        }
      }
    }
    sync_block();

    constexpr int kThreadsPerRow = kAttentionThreads / kNarrowRows;
    const int row = static_cast<int>(threadIdx.x) / kThreadsPerRow;
    if (row >= this_item().num_tokens * this_item().num_heads) return;
    float highest = -INFINITY;
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) {
      highest = fmaxf(highest, sums()[w * kNarrowRows + row].x);
    }
    const float base = exponent_base(highest);
    float weight[Shape::kWarps];
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) {
      const float2 one = sums()[w * kNarrowRows + row];
      weight[w] = ex2(one.x - base);
      total = fmaf(one.y, weight[w], total);
    }
    const int token = token_of_row(p_, this_item(), row);
    const int head = head_of_row(p_, this_item(), row);
    const float factor = (writes_output_ ? inverse_sum(total) : 1.f) * Traits::kOutScale;
    const int64_t state = writes_output_ ? 0 : state_row(p_, this_item(), token, head);
    const int thread = static_cast<int>(threadIdx.x) % kThreadsPerRow;
    if (!writes_output_ && thread == 0) {
      p_.states[2 * state] = highest;
      p_.states[2 * state + 1] = total;
    }
    for (int dim = thread * 8; dim < p_.kv.head_dim; dim += kThreadsPerRow * 8) {
      float values[8] = {};
#pragma unroll
      for (int w = 0; w < Shape::kWarps; ++w) {
        const float* from = merge + (w * kNarrowRows + row) * Shape::kMergeStride + dim;
#pragma unroll
        for (int j = 0; j < 8; ++j) values[j] = fmaf(from[j], weight[w], values[j]);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) values[j] *= factor;
      if (writes_output_) {
        write_output(p_, p_.type, token, head, dim, values);
      } else {
        float4* to = reinterpret_cast<float4*>(p_.accumulators + state * p_.kv.head_dim + dim);
        to[0] = float4{values[0], values[1], values[2], values[3]};
        to[1] = float4{values[4], values[5], values[6], values[7]};
      }
    }
  }
};

template <int kDim, KvType kType, AttentionKernel kKernel>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_kernel(const __grid_constant__ AttentionParams p) {
  AttentionBlock<kDim, kType, kKernel> block(p);
  const int end = p.work.bin_begin[blockIdx.x + 1];
  for (int i = p.work.bin_begin[blockIdx.x]; i < end; ++i) block.run(i);
}

template <int kDim, KvType kType, AttentionKernel kKernel>
AttentionInstance attention_instance() {
  using Shape = AttentionShape<kDim, kType, kKernel>;
  return {.launch =
              [](const AttentionParams& p, const TensorMap&, Grid grid, size_t shared_bytes,
                 void* stream) {
                launch(attention_kernel<kDim, kType, kKernel>, grid, kAttentionThreads,
                       shared_bytes, stream, p);
              },
          .resident =
              [](size_t shared_bytes) {
                return resident_blocks(attention_kernel<kDim, kType, kKernel>, kAttentionThreads,
                                       shared_bytes);
              },
          .fixed_bytes = Shape::kFixedBytes,
          .entry_bytes = Shape::kStepBytes,
          .least_ring_bytes = Shape::kMergeBytes};
}

/// All kernels for heads of up to kDim dimensions.
template <int kDim>
AttentionInstance attention_instances(AttentionKernel kernel, KvType type) {
  const auto of_type = [&]<KvType kType>() {
    return kernel == AttentionKernel::kNarrow
               ? attention_instance<kDim, kType, AttentionKernel::kNarrow>()
               : attention_instance<kDim, kType, AttentionKernel::kWide>();
  };
  switch (type) {
    case KvType::kBF16:
      return of_type.template operator()<KvType::kBF16>();
    case KvType::kF16:
      return of_type.template operator()<KvType::kF16>();
    case KvType::kInt8:
      return of_type.template operator()<KvType::kInt8>();
    case KvType::kFp8E4M3:
      break;
  }
  return of_type.template operator()<KvType::kFp8E4M3>();
}

}  // namespace sagellm::kernels::cuda
