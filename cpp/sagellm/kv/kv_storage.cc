#include "sagellm/kv/kv_storage.h"

#include <cstring>

#include "sagellm/base/error.h"
#include "sagellm/kv/block_pool.h"

namespace sagellm::kv {

std::string_view dtype_name(kernels::KvDtype dtype) {
  return dtype == kernels::KvDtype::kI8 ? "int8" : "bf16";
}

kernels::KvDtype dtype_from_name(std::string_view name) {
  for (const auto dtype : {kernels::KvDtype::kBF16, kernels::KvDtype::kI8}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  fail<InvalidArgument>("the KV dtype is '", name, "'; choose bf16 or int8");
}

int64_t KvStorage::bytes_per_block(int64_t num_slots, int64_t num_kv_heads, int64_t head_dim,
                                   int64_t block_size, kernels::KvDtype dtype) {
  const auto in_range = [](const char* name, int64_t value, int64_t max) {
    require<InvalidArgument>(value >= 1 && value <= max, name, " is ", value, ", must be in 1..",
                             max);
  };
  in_range("num_slots", num_slots, 1 << 12);
  in_range("num_kv_heads", num_kv_heads, 1 << 12);
  in_range("head_dim", head_dim, kernels::kMaxHeadDim);
  in_range("block_size", block_size, 1 << 12);
  require<InvalidArgument>(head_dim % 2 == 0, "head_dim is ", head_dim, ", must be even");
  require<InvalidArgument>(block_size % kernels::kSubPage == 0, "block_size is ", block_size,
                           ", must be a multiple of ", kernels::kSubPage);
  const int64_t sub_pages = block_size / kernels::kSubPage;
  return num_slots * num_kv_heads * sub_pages *
         kernels::kv_sub_page_bytes(dtype, head_dim);  // <= 2^46
}

KvStorage::KvStorage(int64_t num_blocks, int64_t num_slots, int64_t num_kv_heads, int64_t head_dim,
                     int64_t block_size, kernels::KvDtype dtype)
    : num_blocks_(num_blocks),
      num_slots_(num_slots),
      num_kv_heads_(num_kv_heads),
      head_dim_(head_dim),
      block_size_(block_size),
      dtype_(dtype) {
  const int64_t block_bytes = bytes_per_block(num_slots, num_kv_heads, head_dim, block_size, dtype);
  require<InvalidArgument>(num_blocks >= 1 && num_blocks <= BlockPool::kMaxBlocks, "num_blocks is ",
                           num_blocks, ", must be in 1..", BlockPool::kMaxBlocks,
                           "; change the KV budget");
  int64_t size = 0;
  require<InvalidArgument>(!__builtin_mul_overflow(block_bytes, num_blocks + 1, &size),
                           "a KV cache of ", num_blocks, " blocks of ", block_bytes,
                           " bytes exceeds the address space; lower the KV budget");
  head_stride_ = block_size / kernels::kSubPage * kernels::kv_sub_page_bytes(dtype, head_dim);
  slot_stride_ = num_kv_heads * head_stride_;
  block_stride_ = num_slots * slot_stride_;
  buffer_ = Buffer(static_cast<size_t>(size));
}

kernels::KvView KvStorage::view(int slot) {
  require<InvalidArgument>(slot >= 0 && slot < num_slots_, "slot is ", slot, ", must be in 0..",
                           num_slots_ - 1);
  return {.pool = reinterpret_cast<uint8_t*>(buffer_.data()) + slot * slot_stride_,
          .block_stride = block_stride_,
          .head_stride = head_stride_,
          .block_size = static_cast<int32_t>(block_size_),
          .head_dim = static_cast<int32_t>(head_dim_),
          .sub_page_bytes = static_cast<int32_t>(kernels::kv_sub_page_bytes(dtype_, head_dim_)),
          .dtype = dtype_};
}

void KvStorage::copy_block(int32_t source, int32_t destination) {
  const auto valid = [this](int32_t block) { return block >= 1 && block <= num_blocks_; };
  require<InvalidArgument>(valid(source) && valid(destination), "block copy ", source, " -> ",
                           destination, " is outside of blocks 1..", num_blocks_);
  if (source == destination) return;
  const int64_t bytes = bytes_per_block();
  std::memcpy(buffer_.data() + destination * bytes, buffer_.data() + source * bytes,
              static_cast<size_t>(bytes));
}

}  // namespace sagellm::kv
