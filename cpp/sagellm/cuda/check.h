// Inside cpp/sagellm/cuda only: what CUDA calls answer, as exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include "sagellm/base/error.h"

namespace sagellm::cuda {

/// Throws DeviceError naming the call when `error` is not cudaSuccess. Clears errors that are not
/// sticky, so that a refused allocation does not fail the next launch.
inline void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) [[likely]] {
    return;
  }
  (void)cudaGetLastError();
  fail<DeviceError>(call, ": ", cudaGetErrorString(error), " (", cudaGetErrorName(error), ")");
}

inline cudaStream_t native(void* stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace sagellm::cuda
