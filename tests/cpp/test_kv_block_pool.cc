// BlockPool: order, counts and the free list.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/kv/block_pool.h"
#include "sagellm/kv/integrity.h"

namespace sagellm::kv {
namespace {

std::vector<int32_t> free_list(const BlockPool& pool) {
  std::vector<int32_t> blocks;
  for (int32_t b = pool.next_free(0); b != 0; b = pool.next_free(b)) blocks.push_back(b);
  return blocks;
}

TEST(BlockPool, HandsOutEveryBlockOnceAndNever0) {
  BlockPool pool(3);
  EXPECT_EQ(pool.allocate(), 1);
  EXPECT_EQ(pool.allocate(), 2);
  EXPECT_EQ(pool.allocate(), 3);
  EXPECT_EQ(pool.allocate(), 0);
  EXPECT_EQ(pool.num_free(), 0);
  pool.check_integrity();
}

TEST(BlockPool, TakesUncachedBlocksBeforeCachedOnesAndThoseOldestFirst) {
  BlockPool pool(4);
  for (int i = 0; i < 4; ++i) pool.allocate();
  pool.set_owner(2, 7);
  pool.set_owner(4, 8);
  for (const int32_t block : {4, 1, 2, 3}) pool.release(block);
  EXPECT_EQ(free_list(pool), (std::vector<int32_t>{3, 1, 4, 2}));
  pool.check_integrity();
}

TEST(BlockPool, AcquireTakesACachedBlockOffTheFreeList) {
  BlockPool pool(3);
  const int32_t block = pool.allocate();
  pool.set_owner(block, 9);
  pool.release(block);
  pool.acquire(block);
  pool.acquire(block);
  EXPECT_EQ(pool.ref_count(block), 2);
  EXPECT_EQ(pool.num_free(), 2);
  pool.release(block);
  EXPECT_EQ(pool.num_free(), 2);
  pool.release(block);
  EXPECT_EQ(pool.num_free(), 3);
  pool.check_integrity();
}

TEST(BlockPool, ReportsADoubleRelease) {
  BlockPool pool(2);
  const int32_t block = pool.allocate();
  pool.release(block);
  EXPECT_THROW(pool.release(block), IntegrityError);
  pool.check_integrity();
}

TEST(BlockPool, ReportsACachedBlockBeforeAnUncachedOne) {
  BlockPool pool(2);
  pool.set_owner(1, 5);
  EXPECT_THROW(pool.check_integrity(), IntegrityError);
}

TEST(BlockPool, RefusesSizesOutOfRange) {
  EXPECT_THROW(BlockPool(0), InvalidArgument);
  EXPECT_THROW(BlockPool(BlockPool::kMaxBlocks + 1), InvalidArgument);
}

TEST(BlockPool, KeepsItsInvariantsOverRandomUse) {
  BlockPool pool(17);
  std::mt19937 random(3);
  std::vector<int32_t> held;
  for (int i = 0; i < 5000; ++i) {
    if (random() % 2 == 0) {
      const bool had_free = pool.num_free() > 0;
      const int32_t block = pool.allocate();
      ASSERT_EQ(block != 0, had_free);
      if (block == 0) continue;
      ASSERT_EQ(std::count(held.begin(), held.end(), block), 0);
      pool.set_owner(block, static_cast<int32_t>(random() % 2));
      held.push_back(block);
    } else if (!held.empty()) {
      const size_t at = random() % held.size();
      if (random() % 3 == 0) {
        pool.acquire(held[at]);
        held.push_back(held[at]);
      } else {
        pool.release(held[at]);
        held.erase(held.begin() + static_cast<std::ptrdiff_t>(at));
      }
    }
    pool.check_integrity();
  }
}

}  // namespace
}  // namespace sagellm::kv
