// What the CUDA attention kernels read and write. Plain C++: the planner, the module and the
// kernels include it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sagellm/kernels/cuda/float_type.h"

namespace sagellm::kernels::cuda {

/// How K and V are stored. The 8-bit types carry one float scale per (token, kv head), for K and
/// for V: value = scale * code, with scale = max|x| / 127 (int8) or max|x| / 448 (fp8 e4m3). A
/// scale of its own for every row needs no calibration and no outlier of another token can spoil
/// it; it costs 4 bytes for every head_dim.
enum class KvType : int32_t { kBF16, kF16, kInt8, kFp8E4M3 };

constexpr int64_t kv_element_bytes(KvType type) {
  return type == KvType::kBF16 || type == KvType::kF16 ? 2 : 1;
}
constexpr bool kv_has_scales(KvType type) { return kv_element_bytes(type) == 1; }

/// The pages of one layer. A block is one run of memory; the layer's slot of it holds
///
///   K        [kv head][token in block][head_dim]
///   V        [kv head][token in block][head_dim]
///   K scales [kv head][token in block] float     8-bit types only
///   V scales [kv head][token in block] float
///
/// page_size is 16, 32 or 64; head_dim * element bytes is a multiple of 16, so that every row can
/// be moved in 16-byte pieces. Bytes of tokens that were never written are never used.
struct KvPages {
  std::byte* pool = nullptr;  // the layer's slot of block 0, 16-byte aligned
  int64_t block_stride = 0;   // bytes from a block to the next
  int32_t page_size = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  KvType type = KvType::kBF16;
};

/// Bytes of K (or V) of all heads of one layer in one block.
constexpr int64_t kv_plane_bytes(KvType type, int32_t page_size, int32_t num_kv_heads,
                                 int32_t head_dim) {
  return int64_t{page_size} * num_kv_heads * head_dim * kv_element_bytes(type);
}
/// Bytes of one layer in one block.
constexpr int64_t kv_slot_bytes(KvType type, int32_t page_size, int32_t num_kv_heads,
                                int32_t head_dim) {
  const int64_t scales = kv_has_scales(type) ? int64_t{page_size} * num_kv_heads * 4 : 0;
  return 2 * (kv_plane_bytes(type, page_size, num_kv_heads, head_dim) + scales);
}

/// A piece of work: `num_heads` query heads of every kv head, of `num_tokens` query tokens, over
/// the positions [kv_begin, kv_end) of one block table. Row r of the tile is token r / num_heads of
/// the piece and query head first_head + r % num_heads of the group. The same piece is done for
/// every kv head.
struct AttentionItem {
  int32_t table = 0;        // row of block_tables
  int32_t first_token = 0;  // index in AttentionWork::tokens
  int32_t num_tokens = 0;
  int32_t first_head = 0;
  int32_t num_heads = 0;
  int32_t kv_begin = 0;
  int32_t kv_end = 0;
  int32_t split = 0;  // which of its tokens' states this piece writes
};

/// The work of one launch. Block (b, h) of the grid does items [bin_begin[b], bin_begin[b + 1]) for
/// kv head h.
struct AttentionWork {
  const int32_t* bin_begin = nullptr;    // [num_bins + 1]
  const AttentionItem* items = nullptr;  // in the order of the bins
  const int32_t* tokens = nullptr;       // query tokens that items name
  const int32_t* state_begin = nullptr;  // [tokens of the step + 1]: a token's states; an empty
                                         // range: its only item writes the output itself
};

/// One step of attention for one layer. A query at position p sees max(0, p - window + 1) .. p
/// (window 0: 0 .. p). Results depend neither on the order in which blocks run nor on the number of
/// bins: partial states merge in the order of their splits, by whoever finishes last.
struct AttentionParams {
  const void* q =
      nullptr;             // [tokens][q_stride], heads * head_dim values each, after RoPE, unscaled
  void* out = nullptr;     // [tokens][out_stride]
  int64_t q_stride = 0;    // in elements, a multiple of 8
  int64_t out_stride = 0;  // in elements, a multiple of 8
  FloatType type = FloatType::kBF16;  // of q and out, 16 bits; a 16-bit KV type must equal it
  int32_t group = 1;                  // query heads per kv head
  KvPages kv;
  const int32_t* block_tables = nullptr;  // [sequences][block_tables_stride]
  int64_t block_tables_stride = 0;
  const int32_t* positions = nullptr;  // [tokens]
  AttentionWork work;
  float* states = nullptr;        // [state][heads][2]: maximum, sum
  float* accumulators = nullptr;  // [state][heads][head_dim]
  int32_t* arrivals = nullptr;    // [tokens][kv heads], zero before the first launch and after each
  int32_t window = 0;
  float scale = 1.f;    // > 0
  float softcap = 0.f;  // > 0: softcap * tanh(scale * score / softcap)
  int32_t ring = 0;     // set by launch_attention
};

/// The shapes of the kernel. Narrow: 16 rows against the whole bandwidth, for decode. Wide: many
/// rows against the tensor cores, for prefill and shared prefixes. Warpgroup: wide items on the
/// instructions of compute capability 9.0.
enum class AttentionKernel : int32_t { kNarrow, kWide, kWarpgroup };

inline constexpr int kAttentionTileTokens = 64;  // tokens per step, on the absolute grid
inline constexpr int kNarrowRows = 16;
inline constexpr int kAttentionThreads = 128;
inline constexpr int kMaxAttentionHeadDim = 256;
inline constexpr int kMaxWarpgroupHeadDim = 128;
inline constexpr int kLongestAttentionRing = 6;

/// Rows of a wide tile.
constexpr int wide_rows(int head_dim) { return head_dim <= 128 ? 128 : 64; }

}  // namespace sagellm::kernels::cuda
