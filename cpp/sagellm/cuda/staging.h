// Streams host data to the device through two pinned buffers: one is filled, by several threads,
// while the other is copied.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>

#include "sagellm/cuda/memory.h"
#include "sagellm/cuda/stream.h"

namespace sagellm::cuda {

class Staging {
 public:
  static constexpr size_t kBytes = size_t{8} << 20;

  /// `bytes`: of each buffer.
  explicit Staging(const Stream& stream, size_t bytes = kBytes);
  ~Staging();  // waits for the copies
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  /// Queues `num_rows` rows of `row_bytes`, made by write(row, out), to consecutive memory at `to`.
  /// Several threads call `write`, each for rows of its own; what it throws is thrown here.
  void rows(std::byte* to, int64_t num_rows, int64_t row_bytes,
            const std::function<void(int64_t, std::byte*)>& write);

 private:
  struct Half {
    PinnedBuffer memory;
    Event copied;
  };

  const Stream& stream_;
  size_t bytes_;
  std::array<Half, 2> halves_;
  size_t next_ = 0;
};

}  // namespace sagellm::cuda
