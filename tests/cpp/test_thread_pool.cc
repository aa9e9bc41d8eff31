// The thread pool under several team sizes: every thread runs, barriers separate phases, ranges are
// covered once.
#include <gtest/gtest.h>
#include <sched.h>

#include <atomic>
#include <thread>
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
  for (const int total : {0, 1, 2, 5, 36, 1000}) {
    queue.reset();
    std::vector<std::atomic<int>> seen(static_cast<size_t>(total));
    std::atomic<bool> too_long{false};
    pool.run([&](int thread) {
      for (int phase = 0; phase < 3; ++phase) {
        const int64_t max_chunk = phase == 2 ? 7 : total;
        queue.for_each(phase, thread, pool.size(), total, max_chunk,
                       [&](int64_t begin, int64_t end) {
                         if (phase == 2 && end - begin > 7) too_long.store(true);
                         for (int64_t i = begin; i < end; ++i) ++seen[static_cast<size_t>(i)];
                       });
      }
    });
    for (const auto& count : seen) ASSERT_EQ(count.load(), 3);
    EXPECT_FALSE(too_long.load());
  }
}

// A thread of the team that does not get on, as when another program has its core: the others must
// leave theirs.
TEST_P(ThreadPoolTest, ThreadsSleepWhileOneIsHeldUp) {
  const int threads = GetParam();
  ThreadPool pool(threads);
  for (int round = 0; round < 3; ++round) {
    std::atomic<uint64_t> before{0};
    std::atomic<bool> held{false};
    pool.run([&](int thread) {
      if (thread == 0) {
        before = pool.num_sleeps();
        held = true;
        while (pool.num_sleeps() < before + static_cast<uint64_t>(threads) - 1) {
          std::this_thread::yield();
        }
      } else {
        while (!held) std::this_thread::yield();
      }
      pool.barrier();
    });
  }
}

TEST_P(ThreadPoolTest, WorkersSleepBetweenRuns) {
  ThreadPool pool(GetParam());
  const auto workers = static_cast<uint64_t>(GetParam() - 1);
  while (pool.num_sleeps() < workers) std::this_thread::yield();
  int calls = 0;
  pool.run([&](int thread) {  // wakes them
    if (thread == 0) ++calls;
  });
  EXPECT_EQ(calls, 1);
}

INSTANTIATE_TEST_SUITE_P(Sizes, ThreadPoolTest, testing::Values(1, 2, 3, 8));

#if defined(__linux__)
// Far more threads than CPUs: every barrier needs all of them to run in turn.
TEST(ThreadPool, FinishesWhenManyThreadsShareOneCpu) {
  cpu_set_t all;
  ASSERT_EQ(sched_getaffinity(0, sizeof(all), &all), 0);
  cpu_set_t one;
  CPU_ZERO(&one);
  for (int cpu = 0; CPU_COUNT(&one) == 0; ++cpu) {
    if (CPU_ISSET(cpu, &all)) CPU_SET(cpu, &one);
  }
  ASSERT_EQ(sched_setaffinity(0, sizeof(one), &one), 0);  // threads inherit it
  constexpr int kBarriers = 200;
  int64_t passed = 0;
  {
    ThreadPool pool(8);
    std::atomic<int64_t> count{0};
    pool.run([&](int) {
      for (int i = 0; i < kBarriers; ++i) {
        count.fetch_add(1);
        pool.barrier();
      }
    });
    passed = count.load();
    // While one thread polls, no other can come: without sleeping each wait would take a time
    // slice.
    EXPECT_GE(pool.num_sleeps(), uint64_t{kBarriers});
  }
  ASSERT_EQ(sched_setaffinity(0, sizeof(all), &all), 0);
  EXPECT_EQ(passed, 8 * kBarriers);
}
#endif

TEST(ThreadPool, RejectsASizeOutsideItsRange) {
  EXPECT_THROW(ThreadPool(0), InvalidArgument);
  EXPECT_THROW(ThreadPool(2000), InvalidArgument);
}

}  // namespace
}  // namespace sagellm::runtime
