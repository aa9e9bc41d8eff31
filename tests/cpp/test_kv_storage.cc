// KvStorage: the layout that kernels/params.h describes.
#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>

#include "sagellm/base/error.h"
#include "sagellm/kv/kv_storage.h"

namespace sagellm::kv {
namespace {

class KvStorageOf : public ::testing::TestWithParam<kernels::KvDtype> {};

TEST_P(KvStorageOf, PagesOfAllSlotsBlocksAndHeadsAreDisjointAndFillTheMemory) {
  KvStorage storage(3, 2, 4, 8, 32, GetParam());
  EXPECT_EQ(storage.dtype(), GetParam());
  std::set<uint8_t*> pages;
  int64_t page_bytes = 0;
  for (int slot = 0; slot < 2; ++slot) {
    const kernels::KvView view = storage.view(slot);
    EXPECT_EQ(view.block_size, 32);
    EXPECT_EQ(view.head_dim, 8);
    EXPECT_EQ(view.dtype, GetParam());
    EXPECT_EQ(view.sub_page_bytes, kernels::kv_sub_page_bytes(GetParam(), 8));
    page_bytes = view.block_size / kernels::kSubPage * view.sub_page_bytes;
    for (int block = 0; block <= 3; ++block) {
      for (int head = 0; head < 4; ++head) {
        pages.insert(view.pool + block * view.block_stride + head * view.head_stride);
      }
    }
  }
  ASSERT_EQ(pages.size(), 2u * 4 * 4);
  uint8_t* expected = *pages.begin();
  for (uint8_t* page : pages) {
    EXPECT_EQ(page, expected);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(page) % 64, 0u);
    expected += page_bytes;
  }
  EXPECT_EQ(storage.bytes(), page_bytes * static_cast<int64_t>(pages.size()));
  EXPECT_EQ(storage.bytes(), 4 * storage.bytes_per_block());
  EXPECT_EQ(storage.bytes_per_block(), KvStorage::bytes_per_block(2, 4, 8, 32, GetParam()));
}

TEST_P(KvStorageOf, StartsAsZeros) {
  KvStorage storage(5, 1, 2, 16, 16, GetParam());
  const uint8_t* first = storage.view(0).pool;
  EXPECT_TRUE(std::all_of(first, first + storage.bytes(), [](uint8_t x) { return x == 0; }));
}

TEST_P(KvStorageOf, CopiesOneBlockInAllSlotsAndNothingElse) {
  KvStorage storage(3, 2, 2, 8, 16, GetParam());
  const auto slot_bytes = storage.bytes_per_block() / 2;
  const auto fill = [&](int slot, int block) {
    const auto view = storage.view(slot);
    std::fill_n(view.pool + block * view.block_stride, slot_bytes,
                static_cast<uint8_t>(10 * slot + block));
  };
  for (int slot = 0; slot < 2; ++slot) {
    for (int block = 1; block <= 3; ++block) fill(slot, block);
  }
  storage.copy_block(3, 1);
  for (int slot = 0; slot < 2; ++slot) {
    const auto view = storage.view(slot);
    const int expected[] = {0, 10 * slot + 3, 10 * slot + 2, 10 * slot + 3};
    for (int block = 0; block <= 3; ++block) {
      for (int64_t i = 0; i < slot_bytes; ++i) {
        ASSERT_EQ(view.pool[block * view.block_stride + i], expected[block]);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Dtype, KvStorageOf,
                         ::testing::Values(kernels::KvDtype::kBF16, kernels::KvDtype::kI8),
                         [](const auto& test) { return std::string(dtype_name(test.param)); });

TEST(KvStorage, NamesItsDtypes) {
  EXPECT_EQ(dtype_from_name("bf16"), kernels::KvDtype::kBF16);
  EXPECT_EQ(dtype_from_name("int8"), kernels::KvDtype::kI8);
  EXPECT_THROW(dtype_from_name("fp8"), InvalidArgument);
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
