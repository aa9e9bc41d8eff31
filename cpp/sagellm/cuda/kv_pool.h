// The memory of KV pages on a device, in the layout of kernels/cuda/attention_params.h.
#pragma once

#include <cstdint>
#include <span>

#include "sagellm/cuda/memory.h"
#include "sagellm/cuda/stream.h"
#include "sagellm/kernels/cuda/attention_params.h"

namespace sagellm::cuda {

struct KvPoolOptions {
  int64_t num_blocks = 0;  // usable; block 0 comes on top
  int32_t block_size = 0;
  int32_t num_slots = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  kernels::cuda::KvType type = kernels::cuda::KvType::kBF16;

  int64_t slot_bytes() const {
    return kernels::cuda::kv_slot_bytes(type, block_size, num_kv_heads, head_dim);
  }
  /// Bytes of a block, all slots.
  int64_t block_bytes() const { return num_slots * slot_bytes(); }
};

/// Pages of `num_blocks` usable blocks and of block 0 (padding: written and read by rows that
/// nobody looks at). Slot i of a block belongs to the i-th layer of the block's group. A block is
/// one run of memory, zero at the start.
class KvPool {
 public:
  /// Throws InvalidArgument naming the bad size, DeviceError when memory does not suffice.
  KvPool(const KvPoolOptions& options, const Stream& stream);

  const KvPoolOptions& options() const { return options_; }
  /// The pages of one slot, for kernels.
  kernels::cuda::KvPages pages(int32_t slot) const;
  /// Queues copies of whole blocks, one after another; `pairs` are (source, destination).
  void copy_blocks(std::span<const int32_t> pairs, const Stream& stream) const;

  size_t bytes() const { return memory_.size(); }

 private:
  KvPoolOptions options_;
  DeviceBuffer memory_;
};

}  // namespace sagellm::cuda
