// Times the KV cache's bookkeeping and prints JSON: bench_kv [num_blocks [block_size]]
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "sagellm/kv/benchmark.h"

int main(int argc, char** argv) {
  sagellm::kv::BenchmarkOptions options;
  if (argc > 1) options.num_blocks = std::atoll(argv[1]);
  if (argc > 2) options.block_size = std::atoll(argv[2]);
  try {
    const auto result = sagellm::kv::run_benchmark(options);
    std::printf(
        "{\"num_blocks\": %lld, \"block_size\": %lld, \"allocate_free_ns\": %.2f, "
        "\"prefix_path_ns\": %.2f, "
        "\"prefix_hit_rate\": %.3f}\n",
        static_cast<long long>(options.num_blocks), static_cast<long long>(options.block_size),
        result.allocate_free_ns, result.prefix_path_ns, result.prefix_hit_rate);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_kv: %s\n", error.what());
    return 1;
  }
  return 0;
}
