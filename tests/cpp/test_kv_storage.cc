// KvStorage: the layout that kernels/params.h describes.
#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "sagellm/base/error.h"
#include "sagellm/kv/kv_storage.h"

namespace sagellm::kv {
namespace {

TEST(KvStorage, PagesOfAllSlotsBlocksAndHeadsAreDisjointAndFillTheMemory) {
  KvStorage storage(3, 2, 4, 8, 32);
  std::set<uint16_t*> pages;
  int64_t page_elements = 0;
  for (int slot = 0; slot < 2; ++slot) {
    const kernels::KvView view = storage.view(slot);
    EXPECT_EQ(view.block_size, 32);
    EXPECT_EQ(view.head_dim, 8);
    page_elements = view.block_size / kernels::kSubPage * 2 * kernels::kSubPage * view.head_dim;
    for (int block = 0; block <= 3; ++block) {
      for (int head = 0; head < 4; ++head) {
        pages.insert(view.pool + block * view.block_stride + head * view.head_stride);
      }
    }
  }
  ASSERT_EQ(pages.size(), 2u * 4 * 4);
  uint16_t* expected = *pages.begin();
  for (uint16_t* page : pages) {
    EXPECT_EQ(page, expected);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(page) % 64, 0u);
    expected += page_elements;
  }
  EXPECT_EQ(storage.bytes(), 2 * page_elements * static_cast<int64_t>(pages.size()));
  EXPECT_EQ(storage.bytes(), 4 * storage.bytes_per_block());
}

TEST(KvStorage, StartsAsZeros) {
  KvStorage storage(5, 1, 2, 16, 16);
  const uint16_t* first = storage.view(0).pool;
  EXPECT_TRUE(std::all_of(first, first + storage.bytes() / 2, [](uint16_t x) { return x == 0; }));
}

TEST(KvStorage, CopiesOneBlockInAllSlotsAndNothingElse) {
  KvStorage storage(3, 2, 2, 8, 16);
  const auto fill = [&](int slot, int block) {
    const auto view = storage.view(slot);
    std::fill_n(view.pool + block * view.block_stride, view.block_stride / 2,
                static_cast<uint16_t>(10 * slot + block));
  };
  for (int slot = 0; slot < 2; ++slot) {
    for (int block = 1; block <= 3; ++block) fill(slot, block);
  }
  storage.copy_block(3, 1);
  for (int slot = 0; slot < 2; ++slot) {
    const auto view = storage.view(slot);
    const int expected[] = {0, 10 * slot + 3, 10 * slot + 2, 10 * slot + 3};
    for (int block = 0; block <= 3; ++block) {
      for (int64_t i = 0; i < view.block_stride / 2; ++i) {
        ASSERT_EQ(view.pool[block * view.block_stride + i], expected[block]);
      }
    }
  }
}

TEST(KvStorage, RefusesSizesAndBlocksOutOfRange) {
  EXPECT_THROW(KvStorage(0, 1, 1, 8, 16), InvalidArgument);
  EXPECT_THROW(KvStorage(1, 0, 1, 8, 16), InvalidArgument);
  EXPECT_THROW(KvStorage(1, 1, 0, 8, 16), InvalidArgument);
  EXPECT_THROW(KvStorage(1, 1, 1, 7, 16), InvalidArgument);
  EXPECT_THROW(KvStorage(1, 1, 1, kernels::kMaxHeadDim + 2, 16), InvalidArgument);
  EXPECT_THROW(KvStorage(1, 1, 1, 8, 24), InvalidArgument);
  EXPECT_THROW(KvStorage(int64_t{1} << 28, 4096, 4096, 256, 4096), InvalidArgument);
  KvStorage storage(2, 1, 1, 8, 16);
  EXPECT_THROW(storage.copy_block(0, 1), InvalidArgument);
  EXPECT_THROW(storage.copy_block(1, 3), InvalidArgument);
  EXPECT_THROW(storage.view(1), InvalidArgument);
}

}  // namespace
}  // namespace sagellm::kv
