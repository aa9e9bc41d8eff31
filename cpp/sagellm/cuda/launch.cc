// The one place where kernels are started; the emulator has its own.
#include "sagellm/kernels/cuda/launch.h"

#include "sagellm/cuda/check.h"

namespace sagellm::kernels::cuda {

namespace {

constexpr size_t kSharedWithoutAsking = 48 << 10;

void allow_shared(const void* kernel, size_t bytes) {
  if (bytes <= kSharedWithoutAsking) return;
  sagellm::cuda::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(bytes)),
                       "cudaFuncSetAttribute(shared memory)");
}

}  // namespace

void launch_kernel(const void* kernel, Grid grid, uint32_t threads, size_t shared_bytes,
                   void* stream, void** arguments) {
  allow_shared(kernel, shared_bytes);
  sagellm::cuda::check(cudaLaunchKernel(kernel, dim3(grid.x, grid.y, grid.z), dim3(threads),
                                        arguments, shared_bytes, sagellm::cuda::native(stream)),
                       "cudaLaunchKernel");
}

int resident_blocks_of(const void* kernel, uint32_t threads, size_t shared_bytes) {
  allow_shared(kernel, shared_bytes);
  int blocks = 0;
  sagellm::cuda::check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                           &blocks, kernel, static_cast<int>(threads), shared_bytes),
                       "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return blocks;
}

}  // namespace sagellm::kernels::cuda
