#include "sagellm/runtime/bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "sagellm/base/error.h"
#include "sagellm/runtime/thread_pool.h"
#include "sagellm/tensor/buffer.h"

namespace sagellm::runtime {

namespace {

uint64_t read_all(const uint8_t* data, size_t bytes) {
  uint64_t sums[8] = {};
  for (size_t i = 0; i + 64 <= bytes; i += 64) {
    uint64_t line[8];
    std::memcpy(line, data + i, 64);
    for (int j = 0; j < 8; ++j) sums[j] ^= line[j];
  }
  uint64_t all = 0;
  for (const uint64_t sum : sums) all ^= sum;
  return all;
}

size_t status_bytes(const char* key) {
  std::ifstream status("/proc/self/status");
  std::string word;
  while (status >> word) {
    if (word == key) {
      size_t kib = 0;
      status >> kib;
      return kib * 1024;
    }
  }
  return 0;
}

}  // namespace

double read_bandwidth(int num_threads, size_t bytes, int repeat) {
  require<InvalidArgument>(bytes >= (size_t{1} << 20) && repeat >= 1,
                           "the bandwidth probe needs at least 1 MiB and one repeat");
  ThreadPool pool(num_threads);
  Buffer buffer(bytes);
  const size_t share = bytes / static_cast<size_t>(num_threads) / 64 * 64;
  pool.run([&](int thread) {
    std::memset(buffer.data() + static_cast<size_t>(thread) * share, thread + 1, share);
  });
  std::atomic<uint64_t> sink{0};
  std::vector<double> seconds;
  for (int i = 0; i <= repeat; ++i) {
    const auto start = std::chrono::steady_clock::now();
    pool.run([&](int thread) {
      sink.fetch_xor(read_all(buffer.data() + static_cast<size_t>(thread) * share, share),
                     std::memory_order_relaxed);
    });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    if (i > 0) seconds.push_back(elapsed.count());
  }
  std::nth_element(seconds.begin(), seconds.begin() + static_cast<ptrdiff_t>(seconds.size() / 2),
                   seconds.end());
  return static_cast<double>(share * static_cast<size_t>(num_threads)) /
         seconds[seconds.size() / 2];
}

size_t peak_resident_bytes() { return status_bytes("VmHWM:"); }
size_t resident_bytes() { return status_bytes("VmRSS:"); }

}  // namespace sagellm::runtime
