// The memory of the KV pages, in the layout of kernels/params.h.
#pragma once

#include <cstdint>
#include <string_view>

#include "sagellm/kernels/params.h"
#include "sagellm/tensor/buffer.h"

namespace sagellm::kv {

/// "bf16" or "int8".
std::string_view dtype_name(kernels::KvDtype dtype);
/// The dtype of that name; throws InvalidArgument naming both.
kernels::KvDtype dtype_from_name(std::string_view name);

/// Pages of `num_blocks` usable blocks and of block 0 (padding: readable, never owned). Slot i of a
/// block belongs to the i-th layer of the block's group. Layout: [block][slot][kv head][sub-page],
/// zero at the start, so that a position never written reads as a finite value. A block is one run
/// of memory: few pages are touched while few blocks are in use, and it moves in one copy.
class KvStorage {
 public:
  /// Throws InvalidArgument naming the bad size; block_size must be a multiple of 16, head_dim even
  /// and at most kMaxHeadDim.
  KvStorage(int64_t num_blocks, int64_t num_slots, int64_t num_kv_heads, int64_t head_dim,
            int64_t block_size, kernels::KvDtype dtype = kernels::KvDtype::kBF16);

  /// The pages of one slot, for kernels.
  kernels::KvView view(int slot);

  /// Copies all slots of a block.
  void copy_block(int32_t source, int32_t destination);

  int64_t num_blocks() const { return num_blocks_; }
  int num_slots() const { return static_cast<int>(num_slots_); }
  int num_kv_heads() const { return static_cast<int>(num_kv_heads_); }
  int head_dim() const { return static_cast<int>(head_dim_); }
  int block_size() const { return static_cast<int>(block_size_); }
  kernels::KvDtype dtype() const { return dtype_; }
  /// All memory, block 0 included.
  int64_t bytes() const { return static_cast<int64_t>(buffer_.size()); }
  int64_t bytes_per_block() const { return block_stride_; }

  /// bytes_per_block of a storage of these sizes, for planning before there is one.
  static int64_t bytes_per_block(int64_t num_slots, int64_t num_kv_heads, int64_t head_dim,
                                 int64_t block_size,
                                 kernels::KvDtype dtype = kernels::KvDtype::kBF16);

 private:
  int64_t num_blocks_;
  int64_t num_slots_;
  int64_t num_kv_heads_;
  int64_t head_dim_;
  int64_t block_size_;
  kernels::KvDtype dtype_;
  int64_t head_stride_;   // in bytes
  int64_t slot_stride_;   // in bytes
  int64_t block_stride_;  // in bytes
  Buffer buffer_;
};

}  // namespace sagellm::kv
