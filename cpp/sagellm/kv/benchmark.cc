#include "sagellm/kv/benchmark.h"

#include <algorithm>
#include <chrono>
#include <random>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/kv/block_pool.h"
#include "sagellm/kv/kv_cache.h"

namespace sagellm::kv {

namespace {

using Clock = std::chrono::steady_clock;

double nanoseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::nano>(Clock::now() - start).count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

double time_allocate_free(const BenchmarkOptions& options) {
  BlockPool pool(options.num_blocks);
  std::vector<int32_t> blocks(static_cast<size_t>(std::max<int64_t>(1, options.num_blocks / 2)));
  const size_t rounds = 1 + 400'000 / blocks.size();
  const auto start = Clock::now();
  for (size_t round = 0; round < rounds; ++round) {
    for (int32_t& block : blocks) block = pool.allocate();
    for (size_t i = blocks.size(); i-- > 0;) pool.release(blocks[i]);
  }
  return nanoseconds_since(start) / static_cast<double>(rounds * blocks.size());
}

struct PrefixTiming {
  double ns_per_block;
  double hit_rate;
};

PrefixTiming time_prefix_path(const BenchmarkOptions& options) {
  KvCache cache(
      {.num_blocks = options.num_blocks, .block_size = options.block_size, .windows = {0}});
  constexpr size_t kPrompts = 64;
  const int64_t num_tokens = options.blocks_per_request * options.block_size;
  std::mt19937 random(1);
  std::vector<std::vector<int32_t>> prompts(kPrompts,
                                            std::vector<int32_t>(static_cast<size_t>(num_tokens)));
  for (auto& prompt : prompts) {
    for (int32_t& token : prompt) token = static_cast<int32_t>(random() % 50'000);
  }
  const auto unique_at = static_cast<size_t>(options.blocks_per_request / 2 * options.block_size);
  const auto start = Clock::now();
  for (int64_t id = 0; id < options.num_requests; ++id) {
    auto& prompt = prompts[random() % kPrompts];
    prompt[unique_at] = static_cast<int32_t>(50'000 + id);
    cache.add(id, 0);
    (void)cache.match_prefix(id, prompt);
    if (!cache.reserve(id, num_tokens))
      fail<InvalidArgument>("the pool has no room for a request; add blocks");
    cache.commit(id, prompt, num_tokens);
    cache.release(id);
  }
  const double elapsed = nanoseconds_since(start);
  const KvStats stats = cache.stats();
  return {elapsed / static_cast<double>(options.num_requests * options.blocks_per_request),
          static_cast<double>(stats.prefix_hit_tokens) /
              static_cast<double>(stats.prefix_queried_tokens)};
}

}  // namespace

BenchmarkResult run_benchmark(const BenchmarkOptions& options) {
  require<InvalidArgument>(
      options.blocks_per_request >= 1 && options.num_requests >= 1 && options.repeat >= 1,
      "blocks_per_request, num_requests and repeat must be at least 1");
  require<InvalidArgument>(options.blocks_per_request <= options.num_blocks, "a request of ",
                           options.blocks_per_request, " blocks does not fit a pool of ",
                           options.num_blocks);
  std::vector<double> pool_times;
  std::vector<double> prefix_times;
  BenchmarkResult result;
  for (int64_t i = 0; i < options.repeat; ++i) {
    pool_times.push_back(time_allocate_free(options));
    const PrefixTiming timing = time_prefix_path(options);
    prefix_times.push_back(timing.ns_per_block);
    result.prefix_hit_rate = timing.hit_rate;
  }
  result.allocate_free_ns = median(pool_times);
  result.prefix_path_ns = median(prefix_times);
  return result;
}

}  // namespace sagellm::kv
