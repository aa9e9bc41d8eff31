#include "sagellm/cuda/kv_pool.h"

#include "sagellm/base/error.h"

namespace sagellm::cuda {

namespace {

const KvPoolOptions& validated(const KvPoolOptions& options) {
  require<InvalidArgument>(options.num_blocks > 0 && options.num_blocks < INT32_MAX,
                           "num_blocks is ", options.num_blocks, "; it must be positive");
  require<InvalidArgument>(
      options.block_size == 16 || options.block_size == 32 || options.block_size == 64,
      "block_size is ", options.block_size, "; a CUDA device takes 16, 32 or 64");
  require<InvalidArgument>(
      options.num_slots > 0 && options.num_kv_heads > 0 && options.head_dim > 0,
      "num_slots, num_kv_heads and head_dim must be positive");
  require<InvalidArgument>(options.slot_bytes() % 16 == 0, "a slot of ", options.slot_bytes(),
                           " bytes is no multiple of 16");
  return options;
}

}  // namespace

KvPool::KvPool(const KvPoolOptions& options, const Stream& stream)
    : options_(validated(options)),
      memory_(static_cast<size_t>((options.num_blocks + 1) * options.block_bytes())) {
  fill(memory_.data(), 0, memory_.size(), stream.get());
  stream.synchronize();
}

kernels::cuda::KvPages KvPool::pages(int32_t slot) const {
  kernels::cuda::KvPages pages;
  pages.pool = memory_.data() + slot * options_.slot_bytes();
  pages.block_stride = options_.block_bytes();
  pages.page_size = options_.block_size;
  pages.num_kv_heads = options_.num_kv_heads;
  pages.head_dim = options_.head_dim;
  pages.type = options_.type;
  return pages;
}

void KvPool::copy_blocks(std::span<const int32_t> pairs, const Stream& stream) const {
  const int64_t bytes = options_.block_bytes();
  for (size_t i = 0; i + 1 < pairs.size(); i += 2) {
    copy_on_device(memory_.data() + pairs[i + 1] * bytes, memory_.data() + pairs[i] * bytes,
                   static_cast<size_t>(bytes), stream.get());
  }
}

}  // namespace sagellm::cuda
