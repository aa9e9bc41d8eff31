// Maps of arrays in device memory for the copy engine of compute capability 9.0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <utility>

#include "sagellm/kernels/cuda/attention_params.h"
#include "sagellm/kernels/cuda/tensor_map.h"

namespace sagellm::cuda {

/// The pages of one kind of layer as arrays [block][row][dimension], where the rows of a block are
/// those of K, then those of V; boxes are a page high. A map is made once for each layer.
class PageMaps {
 public:
  /// Throws DeviceError when the driver has no such function or refuses, InvalidArgument for 8-bit
  /// pages. The reference stays valid.
  const kernels::cuda::TensorMap& of(const kernels::cuda::KvPages& pages);

 private:
  std::map<std::pair<const std::byte*, int64_t>, kernels::cuda::TensorMap> maps_;
};

}  // namespace sagellm::cuda
