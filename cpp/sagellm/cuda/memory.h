// Memory of a CUDA device, and host memory that it copies from without waiting.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace sagellm::cuda {

/// Throw DeviceError with the size when the device refuses; 0 bytes are null.
std::byte* allocate_device(size_t bytes);
std::byte* allocate_pinned(size_t bytes);
void free_device(std::byte* memory) noexcept;
void free_pinned(std::byte* memory) noexcept;

/// Move-only memory with undefined content.
template <std::byte* (*Allocate)(size_t), void (*Free)(std::byte*) noexcept>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes) : data_(Allocate(bytes)), bytes_(bytes) {}
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Buffer() {
    if (data_ != nullptr) Free(data_);
  }

  std::byte* data() const { return data_; }
  size_t size() const { return bytes_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

/// Of the current device, aligned to 256 bytes.
using DeviceBuffer = Buffer<allocate_device, free_device>;
/// Page-locked, of the host.
using PinnedBuffer = Buffer<allocate_pinned, free_pinned>;

/// Queue copies on `stream`. From or to pageable host memory they may wait for the device; memory
/// must stay alive until the stream has done them.
void copy_to_device(void* to, const void* from, size_t bytes, void* stream);
void copy_to_host(void* to, const void* from, size_t bytes, void* stream);
/// Rows of `row` floats, `stride` floats apart, to dense rows.
void copy_rows_to_host(float* to, int64_t row, const float* from, int64_t stride, int64_t rows,
                       void* stream);
void copy_on_device(void* to, const void* from, size_t bytes, void* stream);
/// Sets every byte.
void fill(void* to, uint8_t value, size_t bytes, void* stream);

}  // namespace sagellm::cuda
