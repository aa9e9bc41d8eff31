// Times something short on a team of threads, over and over.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/runtime/thread_pool.h"

namespace sagellm::runtime {

/// Seconds of one round.
struct Timing {
  double median = 0;
  double best = 0;
  int64_t rounds = 0;
};

/// Runs body(thread, round) on every thread, round after round, for about `seconds` (but at least
/// 3 rounds, after one that is not counted). A round ends when all threads are through. Throws
/// InvalidArgument unless `seconds` is positive.
template <typename Body>
Timing time_rounds(ThreadPool& pool, double seconds, const Body& body) {
  require<InvalidArgument>(seconds > 0 && seconds <= 600, "seconds is ", seconds,
                           "; choose a time between 0 and 600");
  constexpr int64_t kMinRounds = 3;
  constexpr int64_t kMaxRounds = 100000;
  using Clock = std::chrono::steady_clock;
  int64_t round = 0;
  const auto once = [&] {
    const auto start = Clock::now();
    pool.run([&](int thread) { body(thread, round); });
    ++round;
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  once();
  std::vector<double> times;
  const auto start = Clock::now();
  while (static_cast<int64_t>(times.size()) < kMinRounds ||
         (static_cast<int64_t>(times.size()) < kMaxRounds &&
          std::chrono::duration<double>(Clock::now() - start).count() < seconds)) {
    times.push_back(once());
  }
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times.front(), static_cast<int64_t>(times.size())};
}

}  // namespace sagellm::runtime
