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
#include "sagellm/kernels/cuda/attention_tile.cuh"

namespace sagellm::kernels::cuda {

template <int kDim, KvType kType, AttentionKernel kKernel>
struct AttentionShape {
  using Layout = TileLayout<kDim, kType>;
  static constexpr bool kWide = kKernel == AttentionKernel::kWide;
  static constexpr int kWarps = kAttentionThreads / kWarpSize;
  static constexpr int kRows = kWide ? wide_rows(kDim) : kNarrowRows;
  static constexpr int kTiles = kWide ? kRows / kWarps / 16 : 1;  // of 16 rows, per warp
  // Per warp and step. Scores of 64 tokens would not fit in registers beside wide accumulators.
  static constexpr int kTokens = !kWide ? 16 : kDim <= 64 ? 64 : 32;
  static constexpr int kStep = kWide ? kTokens : kAttentionTileTokens;
  static constexpr bool kQueryInRegisters = !kWide && kDim <= 128;
  static constexpr int kCopyThreads = kWide ? kAttentionThreads : kWarpSize;
  static constexpr int kEntryBytes = Layout::entry_bytes(kTokens);  // of a warp, or of the block
  static constexpr int kStepBytes = kEntryBytes * (kWide ? 1 : kWarps);
  static constexpr int kQueryBytes = kRows * Layout::kQueryStride;
  static constexpr int kMergeStride = kDim + 8;  // floats
  static constexpr int kMergeBytes = kWide ? 0 : kWarps * kNarrowRows * kMergeStride * 4;
  static constexpr int kSumBytes = kWide ? 0 : kWarps * kNarrowRows * 8;  // behind Q
  static constexpr int kFixedBytes = kQueryBytes + kSumBytes;
};

template <int kDim, KvType kType, AttentionKernel kKernel>
class AttentionBlock {
  using Shape = AttentionShape<kDim, kType, kKernel>;
  using Layout = typename Shape::Layout;
  using Traits = KvTraits<kType>;
  using Mma = typename Traits::Mma;
  static constexpr int kTiles = Shape::kTiles;
  static constexpr int kTokens = Shape::kTokens;
  static constexpr float kLog2E = 1.4426950408889634f;

 public:
  SAGE_DEVICE explicit AttentionBlock(const AttentionParams& p) : p_(p) {}

  SAGE_DEVICE void run(int item) {
    item_ = item;
    table_ = this_item().table;
    kv_begin_ = this_item().kv_begin;
    kv_end_ = this_item().kv_end;
    next_page_ = page_of_step(first_step());
    for (int e = 0; e < p_.ring - 1; ++e) {
      start_copy(e);
      cp_async_commit();
    }
    const int token = p_.work.tokens[this_item().first_token];  // all of an item's tokens are alike
    writes_output_ = p_.work.state_begin[token] == p_.work.state_begin[token + 1];
    store_query();
    store_ends();
    sync_block();
    find_limits();

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
        load_query<kDim, kType>(fragments[step], query(), step);
      }
      attend(acc, maximum, sum, [&](uint32_t(&a)[4], int, int step) {
#pragma unroll
        for (int w = 0; w < 4; ++w) a[w] = fragments[step][w];
      });
    } else {
      const std::byte* q = query() + first_row() * Layout::kQueryStride;
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
    finish_tokens();
    sync_block();  // before the next item overwrites shared memory
  }

 private:
  // ------------------------------------------------------------------------------------- loading
  // The block that holds 16 tokens of a step: this warp's, or group lane % (kTokens / 16) of those
  // that all warps share. Outside the item's range it is the block of the nearest token inside.
  SAGE_DEVICE int page_of_step(int step) const {
    const int group = Shape::kWide ? lane_id() % (kTokens / 16) : warp_id();
    const int token = step * Shape::kStep + group * 16;
    const int inside = min(max(token, kv_begin_), kv_end_ - 1);
    const int page_shift = p_.kv.page_size == 16 ? 4 : p_.kv.page_size == 32 ? 5 : 6;
    return p_.block_tables[table_ * p_.block_tables_stride + (inside >> page_shift)];
  }

  // Entry 2 n is K of step n, entry 2 n + 1 its V. Called for ascending entries.
  SAGE_DEVICE void start_copy(int entry) {
    if (entry >= num_entries()) return;
    const bool values = entry % 2 != 0;
    const int step = first_step() + entry / 2;
    if (!values) {
      page_ = next_page_;
      if (entry + 2 < num_entries()) next_page_ = page_of_step(step + 1);
    }
    const int first_token = step * Shape::kStep + (Shape::kWide ? 0 : warp_id() * 16);
    std::byte* to = warp_ring() + entry % p_.ring * Shape::kStepBytes;
    const int first_row = head_row() + (values ? plane_rows() : 0);
    const std::byte* pages = p_.kv.pool + int64_t{first_row} * row_bytes();
    const int page_mask = p_.kv.page_size - 1;
    const int thread = Shape::kWide ? static_cast<int>(threadIdx.x) : lane_id();
    constexpr int kChunks = kTokens * Layout::kRowChunks;
#pragma unroll(Shape::kWide ? 2 : 4)  // addresses of more copies at once would spill
    for (int i = 0; i < (kChunks + Shape::kCopyThreads - 1) / Shape::kCopyThreads; ++i) {
      const int index = i * Shape::kCopyThreads + thread;
      const int chunk = min(index, kChunks - 1);
      const int row = chunk / Layout::kRowChunks;
      const int column = chunk % Layout::kRowChunks * 16;
      const int token = first_token + row;
      const int64_t page = Shape::kWide ? shfl(page_, row / 16) : page_;
      const bool inside = token >= kv_begin_ && token < kv_end_ && column < row_bytes();
      const std::byte* from = pages + page * p_.kv.block_stride +
                              (token & page_mask) * row_bytes() + (inside ? column : 0);
      if (kChunks % Shape::kCopyThreads == 0 || index < kChunks) {
        cp_async_16(to + row * Layout::kRowStride + column, from, inside);
      }
    }
    if constexpr (KvTraits<kType>::kHasScales) {  // four tokens at a time; those outside are masked
      const std::byte* scales =
          p_.kv.pool + int64_t{2 * plane_rows()} * row_bytes() + int64_t{first_row} * 4;
      const int row = min(thread, kTokens / 4 - 1) * 4;
      const int64_t page = Shape::kWide ? shfl(page_, row / 16) : page_;
      if (thread < kTokens / 4) {
        cp_async_16(to + kTokens * Layout::kRowStride + row * 4,
                    scales + page * p_.kv.block_stride + ((first_token + row) & page_mask) * 4);
      }
    }
  }

  SAGE_DEVICE void wait_for_copy() const {  // of the oldest of ring - 1 groups
    switch (p_.ring) {
      case 2:
        return cp_async_wait<0>();
      case 3:
        return cp_async_wait<1>();
      case 4:
        return cp_async_wait<2>();
      case 5:
        return cp_async_wait<3>();
      default:
        return cp_async_wait<4>();
    }
  }

  // Entry `entry` is complete, the one before it may be overwritten; starts the next copy.
  SAGE_DEVICE const std::byte* next_entry(int entry) {
    wait_for_copy();
    if constexpr (Shape::kWide) {
      sync_block();
    } else {
      sync_warp();
    }
    start_copy(entry + p_.ring - 1);
    cp_async_commit();
    return warp_ring() + entry % p_.ring * Shape::kStepBytes;
  }

  // Rows of Q in the type of the products; rows and dimensions beyond the tile's are zeros.
  SAGE_DEVICE void store_query() const {
    constexpr int kChunks = kDim / 8;
    const int rows = this_item().num_tokens * this_item().num_heads;
    for (int i = static_cast<int>(threadIdx.x); i < Shape::kRows * kChunks;
         i += kAttentionThreads) {
      const int row = i / kChunks;
      const int chunk = i % kChunks;
      uint4 words{0, 0, 0, 0};
      if (row < rows && chunk * 8 < p_.kv.head_dim) {
        const int64_t token = p_.work.tokens[this_item().first_token + row / this_item().num_heads];
        words = load_stream(static_cast<const uint16_t*>(p_.q) + token * p_.q_stride +
                            int64_t{head_of_row(row)} * p_.kv.head_dim + chunk * 8);
      }
      std::byte* to = query() + row * Layout::kQueryStride;
      if constexpr (!KvTraits<kType>::kHasScales) {
        *reinterpret_cast<uint4*>(to + chunk * 16) = words;
      } else {  // pairs 0 2 4 6 of sixteen dimensions, then 1 3 5 7: see the note on 8-bit K
        to += chunk / 2 * 32 + chunk % 2 * 8;
        *reinterpret_cast<uint2*>(to) = uint2{query_word(words.x), query_word(words.z)};
        *reinterpret_cast<uint2*>(to + 16) = uint2{query_word(words.y), query_word(words.w)};
      }
    }
  }
  SAGE_DEVICE uint32_t
  query_word(uint32_t word) const {  // two values as f16; beyond its range: inf
    if (p_.type == FloatType::kF16) return word;
    const float2 pair = unpack2<bf16>(word);
    return pack_f16(pair.x, pair.y);
  }
  SAGE_DEVICE int head_of_row(int row) const {
    return kv_head() * p_.group + this_item().first_head + row % this_item().num_heads;
  }

  // ---------------------------------------------------------------------------------- what rows
  // see A row sees tokens before its end, which lies in the space between the rows of Q. Rows
  // beyond the tile see everything; they are not written.
  SAGE_DEVICE int32_t* end_of_row(int row) const {
    return reinterpret_cast<int32_t*>(query() + row * Layout::kQueryStride + kDim * 2);
  }
  SAGE_DEVICE void store_ends() const {
    const int row = static_cast<int>(threadIdx.x);
    if (row >= Shape::kRows) return;
    int end = kv_end_;
    if (row < this_item().num_tokens * this_item().num_heads) {
      end = p_.positions[p_.work.tokens[this_item().first_token + row / this_item().num_heads]] + 1;
    }
    *end_of_row(row) = end;
  }
  SAGE_DEVICE void find_limits() {
    const int rows = this_item().num_tokens * this_item().num_heads;
    all_begin_ = kv_begin_;
    all_end_ = kv_end_;
    any_end_ = 0;
#pragma unroll 1
    for (int i = 0; i < 16 * kTiles; ++i) {
      const int row = first_row() + i;
      if (row >= rows) break;
      const int end = *end_of_row(row);
      if (p_.window > 0) all_begin_ = max(all_begin_, end - p_.window);
      all_end_ = min(all_end_, end);
      any_end_ = max(any_end_, end);
    }
  }
  SAGE_DEVICE int first_row() const { return Shape::kWide ? warp_id() * 16 * kTiles : 0; }
  SAGE_DEVICE int row_of(int tile, int half) const {
    return first_row() + tile * 16 + half * 8 + lane_id() / 4;
  }

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
  SAGE_DEVICE int64_t state_row(int token, int head) const {
    return (int64_t{p_.work.state_begin[token]} + this_item().split) *
               (p_.kv.num_kv_heads * p_.group) +
           head;
  }
  template <int kCount>
  SAGE_DEVICE void write_output(int token, int head, int dim, const float (&values)[kCount]) const {
    uint16_t* to = static_cast<uint16_t*>(p_.out) + token * p_.out_stride +
                   int64_t{head} * p_.kv.head_dim + dim;
    uint32_t words[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      words[i] = p_.type == FloatType::kBF16 ? pack_bf16(values[2 * i], values[2 * i + 1])
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
  SAGE_DEVICE static float inverse(float sum) { return sum > 0.f ? 1.f / sum : 0.f; }

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
        const int token = p_.work.tokens[this_item().first_token + row / this_item().num_heads];
        const int head = head_of_row(row);
        const float factor = (writes_output_ ? inverse(sum[i][half]) : 1.f) * Traits::kOutScale;
        const int64_t state = writes_output_ ? 0 : state_row(token, head);
        if (!writes_output_ && lane_id() % 4 == 0) {
          p_.states[2 * state] = maximum[i][half];
          p_.states[2 * state + 1] = sum[i][half];
        }
#pragma unroll
        for (int d = 0; d < kDim / 16; ++d) {
#pragma unroll
          for (int word = 0; word < 2; ++word) {
            const int dim = accumulator_dim<kType>(d, word);
            if (dim >= p_.kv.head_dim) continue;
            float2 pair = accumulator_pair<kType>(acc[i][2 * d], acc[i][2 * d + 1], 2 * half, word);
            pair.x *= factor;
            pair.y *= factor;
            if (writes_output_) {
              write_output(token, head, dim, {pair.x, pair.y});
            } else {
              *reinterpret_cast<float2*>(p_.accumulators + state * p_.kv.head_dim + dim) = pair;
            }
          }
        }
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
    const int token = p_.work.tokens[this_item().first_token + row / this_item().num_heads];
    const int head = head_of_row(row);
    const float factor = (writes_output_ ? inverse(total) : 1.f) * Traits::kOutScale;
    const int64_t state = writes_output_ ? 0 : state_row(token, head);
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
        write_output(token, head, dim, values);
      } else {
        float4* to = reinterpret_cast<float4*>(p_.accumulators + state * p_.kv.head_dim + dim);
        to[0] = float4{values[0], values[1], values[2], values[3]};
        to[1] = float4{values[4], values[5], values[6], values[7]};
      }
    }
  }

  // Merges the states of the tokens for which this block was the last to write one. The merge
  // itself is the same whoever does it.
  SAGE_DEVICE void finish_tokens() {
    if (writes_output_) return;
    threadfence();
    sync_block();
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < this_item().num_tokens) {
      const int token = p_.work.tokens[this_item().first_token + thread];
      const int states = p_.work.state_begin[token + 1] - p_.work.state_begin[token];
      int32_t* arrivals = p_.arrivals + int64_t{token} * p_.kv.num_kv_heads + kv_head();
      const int arrived = atomic_add(arrivals, this_item().num_heads) + this_item().num_heads;
      complete()[thread] = arrived == states * p_.group;
      if (arrived == states * p_.group) *arrivals = 0;  // ready for the next launch
      threadfence();
    }
    sync_block();
    for (int i = 0; i < this_item().num_tokens; ++i) {
      if (complete()[i] != 0) merge_states(p_.work.tokens[this_item().first_token + i]);
    }
  }

  SAGE_DEVICE void merge_states(int token) const {
    const int head_dim = p_.kv.head_dim;
    const int heads = p_.kv.num_kv_heads * p_.group;
    const int64_t first = p_.work.state_begin[token];
    const int count = static_cast<int>(p_.work.state_begin[token + 1] - first);
    for (int i = static_cast<int>(threadIdx.x) * 4; i < p_.group * head_dim;
         i += kAttentionThreads * 4) {
      const int head = kv_head() * p_.group + i / head_dim;
      const int dim = i % head_dim;
      const float* states = p_.states + 2 * (first * heads + head);
      const float* accumulators = p_.accumulators + (first * heads + head) * head_dim + dim;
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
      const float factor = inverse(total);
#pragma unroll
      for (int j = 0; j < 4; ++j) values[j] *= factor;
      write_output(token, head, dim, values);
    }
  }

  // ------------------------------------------------------------------------------------- places
  // Computed again where they are used: the wide kernel has no registers to spare.
  SAGE_DEVICE const AttentionItem& this_item() const { return p_.work.items[item_]; }
  SAGE_DEVICE int first_step() const { return kv_begin_ / Shape::kStep; }
  SAGE_DEVICE int num_entries() const {
    return 2 * ((kv_end_ + Shape::kStep - 1) / Shape::kStep - first_step());
  }
  SAGE_DEVICE static int kv_head() { return static_cast<int>(blockIdx.y); }
  SAGE_DEVICE int row_bytes() const { return p_.kv.head_dim * Traits::kBytes; }
  /// Rows of K (or of V) in a block, and the first one of this kv head.
  SAGE_DEVICE int plane_rows() const { return p_.kv.page_size * p_.kv.num_kv_heads; }
  SAGE_DEVICE int head_row() const { return p_.kv.page_size * kv_head(); }

  SAGE_DEVICE static std::byte* query() { return shared_memory<std::byte>(); }
  /// By token of the item; in the place of Q, once all warps are done with it.
  SAGE_DEVICE static int32_t* complete() { return reinterpret_cast<int32_t*>(query()); }
  SAGE_DEVICE static float2* sums() {
    return reinterpret_cast<float2*>(query() + Shape::kQueryBytes);
  }
  SAGE_DEVICE static std::byte* ring() { return query() + Shape::kFixedBytes; }
  SAGE_DEVICE static std::byte* warp_ring() {
    return ring() + (Shape::kWide ? 0 : warp_id() * Shape::kEntryBytes);
  }

  const AttentionParams& p_;
  int item_;
  int table_;
  int kv_begin_;
  int kv_end_;
  bool writes_output_;  // the item is all that its tokens see: no states
  int page_;            // of the step copied last,
  int next_page_;       // and of the one after it
  int all_begin_;       // tokens in [all_begin_, all_end_) are seen by every row of the warp,
  int all_end_;
  int any_end_;  // tokens from any_end_ on by none
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
              [](const AttentionParams& p, Grid grid, size_t shared_bytes, void* stream) {
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
