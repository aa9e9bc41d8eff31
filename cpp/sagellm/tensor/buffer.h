// Owning memory for weights and KV pages: 64-byte aligned, huge pages where the kernel grants them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace sagellm {

/// Move-only anonymous memory, zero-filled, aligned to a page (2 MiB when `size` >= 2 MiB, where
/// transparent huge pages are requested with madvise). Memory is committed when it is first
/// touched.
class Buffer {
 public:
  Buffer() = default;
  /// Reserves `size` bytes; throws DeviceError with the size when the system refuses.
  explicit Buffer(size_t size);
  Buffer(Buffer&&) noexcept = default;
  Buffer& operator=(Buffer&&) noexcept = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  uint8_t* data() { return data_; }
  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

  /// A part of this memory that keeps the whole alive: many small arrays, one run of huge pages.
  /// Throws InvalidArgument when the range is not inside, or `offset` not a multiple of 64.
  Buffer slice(size_t offset, size_t size);

 private:
  std::shared_ptr<void> mapping_;
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace sagellm
