#include "sagellm/runtime/compute_probe.h"

#include <atomic>
#include <cstdint>
#include <cstring>

#include "sagellm/base/error.h"
#include "sagellm/kernels/cpu/dispatch.h"
#include "sagellm/runtime/thread_pool.h"
#include "sagellm/runtime/timing.h"
#include "sagellm/tensor/buffer.h"

namespace sagellm::runtime {

namespace {

constexpr int64_t kIterations = 20000;               // about 0.1 ms
constexpr int64_t kCacheBytes = int64_t{128} << 10;  // more than an L1, less than any L2
constexpr int64_t kSliceBytes = int64_t{4} << 20;
constexpr int64_t kPasses = 50;

const kernels::ProbeLoop& loop_of(const kernels::ProbeLoops& loops, kernels::ActKind kind) {
  switch (kind) {
    case kernels::ActKind::kF32:
      return loops.f32;
    case kernels::ActKind::kBF16:
      return loops.bf16;
    case kernels::ActKind::kI8:
      break;
  }
  return loops.i8;
}

}  // namespace

ArithmeticPeak arithmetic_peak(std::string_view isa, kernels::ActKind kind, int num_threads,
                               double seconds) {
  const kernels::ProbeLoops loops = kernels::probe_loops(isa);
  const kernels::ProbeLoop& loop = loop_of(loops, kind);
  ThreadPool pool(num_threads);
  const Timing timing = time_rounds(pool, seconds, [&](int, int64_t) { loop.run(kIterations); });
  const double ops = static_cast<double>(loop.ops_per_iteration * kIterations * num_threads);
  return {loop.instruction, ops / timing.median};
}

double memory_bandwidth(std::string_view isa, int num_threads, size_t bytes, double seconds) {
  const kernels::ProbeLoops loops = kernels::probe_loops(isa);
  ThreadPool pool(num_threads);
  const int64_t round_bytes = kSliceBytes * num_threads;
  const int64_t num_rounds = static_cast<int64_t>(bytes) / round_bytes;
  require<InvalidArgument>(num_rounds >= 1, "the memory probe needs at least 4 MiB per thread");
  Buffer buffer(static_cast<size_t>(num_rounds * round_bytes));
  std::memset(buffer.data(), 1, buffer.size());
  std::atomic<uint64_t> sink{0};
  const Timing timing = time_rounds(pool, seconds, [&](int thread, int64_t round) {
    const uint8_t* slice = buffer.data() + round % num_rounds * round_bytes + thread * kSliceBytes;
    sink.fetch_xor(loops.read(slice, kSliceBytes, 1), std::memory_order_relaxed);
  });
  return static_cast<double>(round_bytes) / timing.median;
}

double cache_bandwidth(std::string_view isa, int num_threads, double seconds) {
  const kernels::ProbeLoops loops = kernels::probe_loops(isa);
  ThreadPool pool(num_threads);
  Buffer buffer(static_cast<size_t>(kCacheBytes * num_threads));
  std::memset(buffer.data(), 1, buffer.size());
  std::atomic<uint64_t> sink{0};
  const Timing timing = time_rounds(pool, seconds, [&](int thread, int64_t) {
    sink.fetch_xor(loops.read(buffer.data() + thread * kCacheBytes, kCacheBytes, kPasses),
                   std::memory_order_relaxed);
  });
  return static_cast<double>(kCacheBytes * kPasses * num_threads) / timing.median;
}

}  // namespace sagellm::runtime
