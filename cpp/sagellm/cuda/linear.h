// Linear layers of a model on a device: which kernel multiplies.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "sagellm/cuda/cublas_lt.h"
#include "sagellm/cuda/weights.h"
#include "sagellm/kernels/cuda/float_type.h"

namespace sagellm::cuda {

class Linear {
 public:
  /// `library`: null for own kernels only, whose results do not depend on the batch.
  Linear(kernels::cuda::FloatType type, std::shared_ptr<const CublasLt> library);

  struct Call {
    const void* x = nullptr;  // [rows][x_stride] of the type
    int64_t x_stride = 0;     // in elements, as are all strides
    int32_t rows = 0;
    void* out = nullptr;      // [rows][out_stride]
    int64_t out_stride = 0;
    kernels::cuda::FloatType out_type = kernels::cuda::FloatType::kF32;
  };
  /// Queues out = x @ weights.T on `stream`.
  void operator()(const LinearWeights& weights, const Call& call, void* stream);

 private:
  kernels::cuda::FloatType type_;
  std::optional<CublasLtGemm> library_;
};

}  // namespace sagellm::cuda
