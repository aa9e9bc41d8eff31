// Starting a kernel, without CUDA's headers: what launch functions of every family share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sagellm::kernels::cuda {

/// Blocks of a launch.
struct Grid {
  uint32_t x = 1;
  uint32_t y = 1;
  uint32_t z = 1;
};

/// Queues `kernel` on `stream` with `shared_bytes` of dynamic shared memory, raising the kernel's
/// limit above 48 KiB where needed. Throws DeviceError naming the CUDA call that failed. Kernels
/// use the typed `launch` of platform.cuh.
void launch_kernel(const void* kernel, Grid grid, uint32_t threads, size_t shared_bytes,
                   void* stream, void** arguments);

/// Blocks of `kernel` that one multiprocessor of the current device holds at a time.
int resident_blocks_of(const void* kernel, uint32_t threads, size_t shared_bytes);

}  // namespace sagellm::kernels::cuda
