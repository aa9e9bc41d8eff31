// The thread pool under several team sizes: every thread runs, barriers separate phases, ranges are
// covered once.
#include <gtest/gtest.h>

#include <atomic>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/runtime/thread_pool.h"

namespace sagellm::runtime {
namespace {

class ThreadPoolTest : public testing::TestWithParam<int> {};

TEST_P(ThreadPoolTest, RunsTheTaskOncePerThread) {
  ThreadPool pool(GetParam());
  std::vector<std::atomic<int>> calls(static_cast<size_t>(GetParam()));
  for (int round = 1; round <= 200; ++round) {
    pool.run([&](int thread) { calls[static_cast<size_t>(thread)].fetch_add(1); });
    for (const auto& count : calls) ASSERT_EQ(count.load(), round);
  }
}

TEST_P(ThreadPoolTest, BarrierMakesEarlierWritesVisible) {
  const int threads = GetParam();
  ThreadPool pool(threads);
  std::vector<int> written(static_cast<size_t>(threads),
                           -1);  // plain memory: the barrier orders it
  std::atomic<int> wrong{0};
  pool.run([&](int thread) {
    for (int round = 0; round < 500; ++round) {
      written[static_cast<size_t>(thread)] = round;
      pool.barrier();
      for (const int value : written) wrong += value != round;
      pool.barrier();
    }
  });
  EXPECT_EQ(wrong.load(), 0);
}

TEST_P(ThreadPoolTest, QueueHandsOutEveryItemOnce) {
  ThreadPool pool(GetParam());
  WorkQueue queue(3);
  for (int round = 0; round < 20; ++round) {
    queue.reset();
    std::vector<std::atomic<int>> seen(1000);
    pool.run([&](int thread) {
      for (int phase = 0; phase < 3; ++phase) {
        queue.for_each(phase, thread, pool.size(), 1000, 7, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) seen[static_cast<size_t>(i)].fetch_add(1);
        });
      }
    });
    for (const auto& count : seen) ASSERT_EQ(count.load(), 3);
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, ThreadPoolTest, testing::Values(1, 2, 3, 8));

TEST(ThreadPool, RejectsASizeOutsideItsRange) {
  EXPECT_THROW(ThreadPool(0), InvalidArgument);
  EXPECT_THROW(ThreadPool(2000), InvalidArgument);
}

}  // namespace
}  // namespace sagellm::runtime
