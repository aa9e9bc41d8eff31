// Padding of decode steps to a few shapes, and where the arrays of a step lie.
#include <gtest/gtest.h>

#include <set>
#include <vector>

#include "sagellm/cuda/step_shape.h"

namespace sagellm::cuda {
namespace {

TEST(DecodeBucket, PadsToTheNextSize) {
  EXPECT_EQ(decode_bucket_sizes(256), (std::vector<int32_t>{1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64,
                                                            80, 96, 112, 128, 160, 192, 224, 256}));
  EXPECT_EQ(decode_bucket_sizes(50), (std::vector<int32_t>{1, 2, 4, 8, 16, 24, 32, 40, 48, 50}));
  EXPECT_EQ(decode_bucket_sizes(0), std::vector<int32_t>{});
}

TEST(DecodeBucket, IsNeverSmallerNorWastesMoreThanHalf) {
  for (int32_t max = 1; max <= 256; max += 5) {
    for (int32_t n = 1; n <= max; ++n) {
      const StepShape shape = decode_bucket(n, 3, max, 100);
      EXPECT_GE(shape.sequences, n);
      EXPECT_LE(shape.sequences, max);
      EXPECT_LT(shape.sequences, 2 * n);
      EXPECT_EQ(shape.tokens, shape.sequences);
      EXPECT_EQ(shape.logit_rows, shape.sequences);
    }
  }
}

TEST(DecodeBucket, TablesArePowersOfTwoUpToTheLongest) {
  EXPECT_EQ(decode_bucket(1, 1, 8, 100).table_width, 1);
  EXPECT_EQ(decode_bucket(1, 5, 8, 100).table_width, 8);
  EXPECT_EQ(decode_bucket(1, 64, 8, 100).table_width, 64);
  EXPECT_EQ(decode_bucket(1, 65, 8, 100).table_width, 100);
}

TEST(StepLayout, ArraysDoNotOverlapAndAreAligned) {
  const StepShape shape{.tokens = 7, .sequences = 3, .logit_rows = 2, .table_width = 5};
  const StepLayout at = step_layout(shape, 2, {9, 33});
  const std::vector<std::pair<size_t, size_t>> arrays = {{at.token_ids, 7},
                                                         {at.positions, 7},
                                                         {at.slots, 14},
                                                         {at.logit_rows, 2},
                                                         {at.block_tables, 2 * 3 * 5},
                                                         {at.plans[0], 9},
                                                         {at.plans[1], 33}};
  size_t end = 0;
  for (const auto& [begin, words] : arrays) {
    EXPECT_EQ(begin % 16, 0u);
    EXPECT_GE(begin, end);
    end = begin + words * sizeof(int32_t);
  }
  EXPECT_GE(at.bytes, end);
}

TEST(StepLayout, InputsLieWhereTheyLieWithoutPlans) {
  const StepShape shape{.tokens = 7, .sequences = 3, .logit_rows = 2, .table_width = 5};
  const StepLayout without = step_layout(shape, 2, {});
  const StepLayout with = step_layout(shape, 2, {100});
  EXPECT_EQ(without.block_tables, with.block_tables);
  EXPECT_EQ(without.bytes, with.plans[0]);
}

}  // namespace
}  // namespace sagellm::cuda
