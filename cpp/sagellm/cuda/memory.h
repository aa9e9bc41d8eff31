// Memory of a CUDA device, and host memory that it copies from without waiting.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace sagellm::cuda {

/// Move-only memory of the current device, aligned to 256 bytes, with undefined content. Throws
/// DeviceError with the size when the device refuses.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(size_t bytes);
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~DeviceBuffer();

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

/// Move-only page-locked host memory.
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  explicit PinnedBuffer(size_t bytes);
  PinnedBuffer(PinnedBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~PinnedBuffer();

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
