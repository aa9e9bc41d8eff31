// A persistent team of threads for one model: fork-join runs, a fast barrier, self-scheduled
// ranges.
//
// Waiting spins for a few microseconds (phases of a decode step are that short), then sleeps on a
// futex, so that a busy host costs a wake-up and not a time slice. Threads are not pinned.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace sagellm::runtime {

/// A generation-counting barrier for a fixed number of threads.
class Barrier {
 public:
  explicit Barrier(int num_threads) : num_threads_(num_threads) {}

  /// Returns when all threads have arrived; what they wrote before is visible after.
  void arrive_and_wait();

  /// How often a thread gave up polling and slept until the others came.
  uint64_t num_sleeps() const { return num_sleeps_.load(std::memory_order_relaxed); }

 private:
  const int num_threads_;
  std::atomic<uint64_t> num_sleeps_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
};

/// Fixed threads that run one task at a time together with the caller (thread 0).
class ThreadPool {
 public:
  /// Starts `num_threads - 1` threads; throws InvalidArgument below 1 or above 1024, DeviceError
  /// when the system refuses a thread.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return num_threads_; }

  /// Calls task(thread_index) on every thread and waits for all. The task must not throw. One run
  /// at a time.
  template <typename Task>
  void run(Task&& task) {
    run_erased([](void* context,
                  int thread) { (*static_cast<std::remove_reference_t<Task>*>(context))(thread); },
               const_cast<void*>(static_cast<const void*>(&task)));
  }

  /// Meets all threads of the running task.
  void barrier() { barrier_.arrive_and_wait(); }

  /// How often one of the threads slept, at a barrier or between two runs: a thread that waits
  /// long leaves its core to others.
  uint64_t num_sleeps() const {
    return barrier_.num_sleeps() + num_sleeps_.load(std::memory_order_relaxed);
  }

 private:
  using Erased = void (*)(void*, int);
  void run_erased(Erased task, void* context);
  void worker(int thread);

  const int num_threads_;
  Barrier barrier_;
  std::atomic<uint64_t> num_sleeps_{0};
  Erased task_ = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<uint32_t> epoch_{0};
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> threads_;
};

/// Counters for self-scheduled ranges: one per phase of a step, so that none is reset while threads
/// use it.
class WorkQueue {
 public:
  explicit WorkQueue(int num_phases) : next_(static_cast<size_t>(num_phases)) {}

  /// Makes every phase start at 0 again; no thread may be inside `for_each`.
  void reset() {
    for (Counter& counter : next_) counter.value.store(0, std::memory_order_relaxed);
  }

  /// Shares [0, total) of phase `phase` and calls body(begin, end) for each chunk of this thread.
  /// Chunks are half of what is left, divided among the threads, and at most `max_chunk`: long ones
  /// first, because they cost little, then ever shorter ones, so that all threads end together
  /// (factoring: Hummel, Schonberg and Flynn, 1992). Thread t begins with chunk t, the rest goes to
  /// whoever asks. All callers of a phase pass the same sizes.
  template <typename Body>
  void for_each(int phase, int thread, int num_threads, int64_t total, int64_t max_chunk,
                Body&& body) {
    std::atomic<int64_t>& next = next_[static_cast<size_t>(phase)].value;
    int64_t index = thread;  // of the chunk, among those of its length from `first` on
    int64_t first = 0;
    int64_t seen = 0;  // chunks before `first`
    while (first < total) {
      const int64_t half = (total - first + 2 * num_threads - 1) / (2 * num_threads);
      const int64_t chunk = half < max_chunk ? half : max_chunk;
      if (index - seen >= num_threads) {
        first += num_threads * chunk;
        seen += num_threads;
        continue;
      }
      const int64_t begin = first + (index - seen) * chunk;
      if (begin >= total) return;
      body(begin, begin + chunk < total ? begin + chunk : total);
      index = num_threads + next.fetch_add(1, std::memory_order_relaxed);
    }
  }

 private:
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };
  std::vector<Counter> next_;
};

}  // namespace sagellm::runtime
