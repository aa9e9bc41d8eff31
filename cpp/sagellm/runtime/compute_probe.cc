#include "sagellm/runtime/compute_probe.h"

#include <atomic>
#include <cstdint>
#include <cstring>

#include "sagellm/kernels/cpu/dispatch.h"
#include "sagellm/runtime/thread_pool.h"
#include "sagellm/runtime/timing.h"
#include "sagellm/tensor/buffer.h"

namespace sagellm::runtime {

namespace {

constexpr int64_t kIterations = 20000;               // about 0.1 ms
constexpr int64_t kCacheBytes = int64_t{128} << 10;  // more than an L1, less than any L2
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
