#include "sagellm/cuda/memory.h"

#include <string>

#include "sagellm/cuda/check.h"

namespace sagellm::cuda {

std::byte* allocate_device(size_t bytes) {
  void* pointer = nullptr;
  if (bytes == 0) return nullptr;
  const cudaError_t error = cudaMalloc(&pointer, bytes);
  if (error != cudaSuccess) check(error, ("cudaMalloc of " + std::to_string(bytes)).c_str());
  return static_cast<std::byte*>(pointer);
}

std::byte* allocate_pinned(size_t bytes) {
  void* pointer = nullptr;
  if (bytes == 0) return nullptr;
  const cudaError_t error = cudaHostAlloc(&pointer, bytes, cudaHostAllocDefault);
  if (error != cudaSuccess) check(error, ("cudaHostAlloc of " + std::to_string(bytes)).c_str());
  return static_cast<std::byte*>(pointer);
}

// Both fail only when an earlier call has failed.
void free_device(std::byte* memory) noexcept { (void)cudaFree(memory); }
void free_pinned(std::byte* memory) noexcept { (void)cudaFreeHost(memory); }

void copy_to_device(void* to, const void* from, size_t bytes, void* stream) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, native(stream)),
        "cudaMemcpyAsync to the device");
}

void copy_to_host(void* to, const void* from, size_t bytes, void* stream) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, native(stream)),
        "cudaMemcpyAsync to the host");
}

void copy_rows_to_host(float* to, int64_t row, const float* from, int64_t stride, int64_t rows,
                       void* stream) {
  const auto bytes = [](int64_t floats) { return static_cast<size_t>(floats) * sizeof(float); };
  check(cudaMemcpy2DAsync(to, bytes(row), from, bytes(stride), bytes(row),
                          static_cast<size_t>(rows), cudaMemcpyDeviceToHost, native(stream)),
        "cudaMemcpy2DAsync to the host");
}

void copy_on_device(void* to, const void* from, size_t bytes, void* stream) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, native(stream)),
        "cudaMemcpyAsync on the device");
}

void fill(void* to, uint8_t value, size_t bytes, void* stream) {
  check(cudaMemsetAsync(to, value, bytes, native(stream)), "cudaMemsetAsync");
}

}  // namespace sagellm::cuda
