// Work of a block on one item that is not arithmetic: which rows see which tokens, and the copies
// of Q, K and V into shared memory.
#pragma once

#include "sagellm/kernels/cuda/attention_output.cuh"
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
class AttentionLoader {
 protected:
  using Shape = AttentionShape<kDim, kType, kKernel>;
  using Layout = typename Shape::Layout;
  using Traits = KvTraits<kType>;
  static constexpr int kTiles = Shape::kTiles;
  static constexpr int kTokens = Shape::kTokens;

  SAGE_DEVICE explicit AttentionLoader(const AttentionParams& p) : p_(p) {}

  // Begins an item: the first copies are on their way, Q and the limits of its rows are there.
  SAGE_DEVICE void start(int item) {
    item_ = item;
    table_ = this_item().table;
    kv_begin_ = this_item().kv_begin;
    kv_end_ = this_item().kv_end;
    next_page_ = page_of_step(first_step());
    for (int e = 0; e < p_.ring - 1; ++e) {
      start_copy(e);
      cp_async_commit();
    }
    writes_output_ = writes_output(p_, this_item());
    store_query();
    store_ends();
    sync_block();
    find_limits();
  }

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
        const int64_t token = token_of_row(p_, this_item(), row);
        words =
            load_stream(static_cast<const uint16_t*>(p_.q) + token * p_.q_stride +
                        int64_t{head_of_row(p_, this_item(), row)} * p_.kv.head_dim + chunk * 8);
      }
      std::byte* to = query_rows() + row * Layout::kQueryStride;
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

  // ---------------------------------------------------------------------------------- what rows
  // see A row sees tokens before its end, which lies in the space between the rows of Q. Rows
  // beyond the tile see everything; they are not written.
  SAGE_DEVICE int32_t* end_of_row(int row) const {
    return reinterpret_cast<int32_t*>(query_rows() + row * Layout::kQueryStride + kDim * 2);
  }
  SAGE_DEVICE void store_ends() const {
    const int row = static_cast<int>(threadIdx.x);
    if (row >= Shape::kRows) return;
    int end = kv_end_;
    if (row < this_item().num_tokens * this_item().num_heads) {
      end = p_.positions[token_of_row(p_, this_item(), row)] + 1;
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

  SAGE_DEVICE static std::byte* query_rows() { return shared_memory<std::byte>(); }
  /// By token of the item; in the place of Q, once all warps are done with it.
  SAGE_DEVICE static int32_t* complete() { return reinterpret_cast<int32_t*>(query_rows()); }
  SAGE_DEVICE static float2* sums() {
    return reinterpret_cast<float2*>(query_rows() + Shape::kQueryBytes);
  }
  SAGE_DEVICE static std::byte* ring() { return query_rows() + Shape::kFixedBytes; }
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

}  // namespace sagellm::kernels::cuda
