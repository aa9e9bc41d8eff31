#include "sagellm/cuda/staging.h"

#include <algorithm>

namespace sagellm::cuda {

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
    for (int64_t row = begin; row < end; ++row) {
      write(row, half.memory.data() + (row - begin) * row_bytes);
    }
    copy_to_device(to + begin * row_bytes, half.memory.data(),
                   static_cast<size_t>((end - begin) * row_bytes), stream_.get());
    half.copied.record(stream_);
  }
}

}  // namespace sagellm::cuda
