#include "sagellm/cuda/staging.h"

#include <algorithm>
#include <future>
#include <thread>
#include <vector>

namespace sagellm::cuda {

namespace {

constexpr int64_t kThreadBytes = int64_t{256} << 10;  // that are worth a thread
constexpr int64_t kMostThreads = 8;

/// Calls body(begin, end) for parts of [0, rows) on several threads.
template <typename Body>
void split(int64_t rows, int64_t row_bytes, const Body& body) {
  const int64_t cpus =
      std::clamp(int64_t{std::thread::hardware_concurrency()}, int64_t{1}, kMostThreads);
  const int64_t parts =
      std::clamp(rows * row_bytes / kThreadBytes, int64_t{1}, std::min(cpus, rows));
  std::vector<std::future<void>> others;
  for (int64_t part = 1; part < parts; ++part) {
    others.push_back(
        std::async(std::launch::async, body, part * rows / parts, (part + 1) * rows / parts));
  }
  body(0, rows / parts);
  for (std::future<void>& other : others) other.get();
}

}  // namespace

Staging::Staging(const Stream& stream, size_t bytes) : stream_(stream), bytes_(bytes) {}

Staging::~Staging() {
  try {
    stream_.synchronize();
  } catch (...) {  // an error of the device that the next call on it reports again
  }
}

void Staging::rows(std::byte* to, int64_t num_rows, int64_t row_bytes,
                   const std::function<void(int64_t, std::byte*)>& write) {
  const int64_t step = std::max(int64_t{1}, static_cast<int64_t>(bytes_) / row_bytes);
  const auto chunk_bytes = static_cast<size_t>(std::min(step, num_rows) * row_bytes);
  for (int64_t begin = 0; begin < num_rows; begin += step) {
    Half& half = halves_[next_++ % halves_.size()];
    half.copied.synchronize();
    if (half.memory.size() < chunk_bytes) {
      half.memory = PinnedBuffer(std::max(chunk_bytes, bytes_));
    }
    const int64_t end = std::min(begin + step, num_rows);
    split(end - begin, row_bytes, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        write(begin + row, half.memory.data() + row * row_bytes);
      }
    });
    copy_to_device(to + begin * row_bytes, half.memory.data(),
                   static_cast<size_t>((end - begin) * row_bytes), stream_.get());
    half.copied.record(stream_);
  }
}

}  // namespace sagellm::cuda
