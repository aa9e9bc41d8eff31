// Timing of the KV cache's bookkeeping, without Python in the way.
#pragma once

#include <cstdint>

namespace sagellm::kv {

struct BenchmarkOptions {
  int64_t num_blocks = 8192;
  int64_t block_size = 32;
  int64_t blocks_per_request = 64;
  int64_t num_requests = 2000;
  int64_t repeat = 5;
};

/// Medians over the repeats, in nanoseconds per block.
struct BenchmarkResult {
  double allocate_free_ns = 0;  // BlockPool: one allocate and its release
  double prefix_path_ns =
      0;  // KvCache: match, reserve, commit (hash, publish) and release, per block of prompt
  double prefix_hit_rate = 0;  // cached share of the prompt blocks in that run
};

/// Requests draw one of 64 prompts; the second half of every prompt is unique to the request, so
/// blocks are evicted all the time once the pool is full. Throws InvalidArgument when a request
/// does not fit the pool.
BenchmarkResult run_benchmark(const BenchmarkOptions& options);

}  // namespace sagellm::kv
