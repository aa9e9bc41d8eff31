#include "sagellm/kv/block_pool.h"

#include "sagellm/base/error.h"
#include "sagellm/kv/integrity.h"

namespace sagellm::kv {

BlockPool::BlockPool(int64_t num_blocks) {
  require<InvalidArgument>(num_blocks >= 1 && num_blocks <= kMaxBlocks, "num_blocks is ",
                           num_blocks, ", must be in 1..", kMaxBlocks, "; change the KV budget");
  num_blocks_ = static_cast<int32_t>(num_blocks);
  blocks_.resize(static_cast<size_t>(num_blocks) + 1);
  for (int32_t block = 1; block <= num_blocks_; ++block) link_after(blocks_[0].prev, block);
}

void BlockPool::fail_release(int32_t block) {
  check_invariant(false, "block ", block, " was released more often than acquired");
  __builtin_unreachable();
}

void BlockPool::check_integrity() const {
  check_invariant(at(0).ref_count == 0 && at(0).owner == 0, "block 0 is in use");
  int32_t num_unreferenced = 0;
  for (int32_t block = 1; block <= num_blocks_; ++block) {
    check_invariant(at(block).ref_count >= 0, "block ", block, " has a negative reference count");
    if (at(block).ref_count == 0) ++num_unreferenced;
  }
  check_invariant(num_unreferenced == num_free_, num_unreferenced,
                  " blocks have no reference but num_free is ", num_free_);
  int32_t num_listed = 0;
  bool seen_owner = false;
  for (int32_t prev = 0, block = at(0).next; block != 0; prev = block, block = at(block).next) {
    check_invariant(++num_listed <= num_free_,
                    "the free list is longer than num_free or has a cycle");
    check_invariant(at(block).prev == prev, "free list links around block ", block, " disagree");
    check_invariant(at(block).ref_count == 0, "block ", block, " is free and referenced");
    check_invariant(at(block).owner != 0 || !seen_owner, "block ", block,
                    " is not cached but behind cached blocks");
    seen_owner = at(block).owner != 0;
  }
  check_invariant(num_listed == num_free_, "the free list has ", num_listed,
                  " blocks, num_free is ", num_free_);
}

}  // namespace sagellm::kv
