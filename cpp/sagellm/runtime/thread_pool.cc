#include "sagellm/runtime/thread_pool.h"

#include <system_error>

#include "sagellm/base/error.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sagellm::runtime {

namespace {

// About 10 us of polling on current machines before a waiter sleeps.
constexpr int kSpins = 400;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// Waits until `value` differs from `old`; returns the new value. Counts the sleep, if it comes to
/// one.
uint32_t wait_for_change(const std::atomic<uint32_t>& value, uint32_t old,
                         std::atomic<uint64_t>& num_sleeps) {
  for (int i = 0; i < kSpins; ++i) {
    const uint32_t now = value.load(std::memory_order_acquire);
    if (now != old) return now;
    pause();
  }
  num_sleeps.fetch_add(1, std::memory_order_relaxed);
  value.wait(old, std::memory_order_acquire);
  return value.load(std::memory_order_acquire);
}

}  // namespace

void Barrier::arrive_and_wait() {
  if (num_threads_ == 1) return;
  const uint32_t generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    generation_.notify_all();
  } else {
    wait_for_change(generation_, generation, num_sleeps_);
  }
}

ThreadPool::ThreadPool(int num_threads) : num_threads_(num_threads), barrier_(num_threads) {
  require<InvalidArgument>(num_threads >= 1 && num_threads <= 1024, "threads is ", num_threads,
                           "; choose between 1 and 1024");
  threads_.reserve(static_cast<size_t>(num_threads - 1));
  try {
    for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this, i] { worker(i); });
  } catch (const std::system_error&) {
    const size_t started = threads_.size() + 1;
    stopping_.store(true);
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    fail<DeviceError>("the system allowed only ", started, " of ", num_threads,
                      " threads; lower --threads");
  }
}

ThreadPool::~ThreadPool() {
  stopping_.store(true, std::memory_order_relaxed);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run_erased(Erased task, void* context) {
  task_ = task;
  context_ = context;
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  task(context, 0);
  barrier();
}

void ThreadPool::worker(int thread) {
  uint32_t epoch = 0;
  for (;;) {
    epoch = wait_for_change(epoch_, epoch, num_sleeps_);
    if (stopping_.load(std::memory_order_relaxed)) return;
    task_(context_, thread);
    barrier();
  }
}

}  // namespace sagellm::runtime
