// What the copy engine of compute capability 9.0 has to know of an array. Plain C++.
#pragma once

#include <cstdint>

namespace sagellm::kernels::cuda {

/// CUtensorMap of the driver: opaque, written by the driver alone. The low bits of its address and
/// its place in a kernel's parameters are part of its contract.
struct alignas(64) TensorMap {
  uint64_t opaque[16] = {};
};

}  // namespace sagellm::kernels::cuda
