// Linear layers of a model on a device: which kernel multiplies.
//
//   rows     dense                       quantized
//   1..8     small_linear                quantized_linear
//   9..64    cuBLASLt, or own gemm       quantized_linear, 8 rows at a time: fewer bytes than
//                                        writing the values out and reading them again
//   more     cuBLASLt, or own gemm       dequantize, then as dense
//
//   rows     FP8, from 8.9 on            FP8 on older devices
//   1..8     fp8_small_linear            fp8_small_linear
//   9..64    x as FP8; cuBLASLt or own   fp8_small_linear, 8 rows at a time
//   more     fp8_gemm                    fp8_dequantize, then as dense
//
// Deterministic: gemm for dense, quantized_linear for quantized weights, and for FP8 fp8_gemm or,
// on older devices, fp8_small_linear, whatever the rows: the bits of a row do not depend on how
// many there are.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "sagellm/cuda/cublas_lt.h"
#include "sagellm/cuda/memory.h"
#include "sagellm/cuda/weights.h"
#include "sagellm/kernels/cuda/float_type.h"

namespace sagellm::cuda {

struct LinearOptions {
  kernels::cuda::FloatType type = kernels::cuda::FloatType::kBF16;
  bool deterministic = false;
  int64_t max_k = 0;                        // most inputs of a quantized layer; 0: there is none
  int64_t max_fp8_k = 0;                    // the same of FP8 layers
  bool fp8_tensor_cores = false;            // compute capability 8.9 or newer
  std::shared_ptr<const CublasLt> library;  // null: own kernels only
};

class Linear {
 public:
  static constexpr int32_t kSmallRows = 8;
  static constexpr int32_t kFewRows = 64;

  explicit Linear(const LinearOptions& options);

  struct Call {
    const void* x = nullptr;  // [rows][x_stride] of the type
    int64_t x_stride = 0;     // in elements, as are all strides
    int32_t rows = 0;
    void* out = nullptr;  // [rows][out_stride]
    int64_t out_stride = 0;
    kernels::cuda::FloatType out_type = kernels::cuda::FloatType::kF32;
  };
  /// Queues out = x @ weights.T on `stream`.
  void operator()(const LinearWeights& weights, const Call& call, void* stream);

  size_t bytes() const {
    return quantized_x_.size() + values_.size() + fp8_x_.size() + fp8_x_scales_.size();
  }

 private:
  const void* x_row(const Call& call, int64_t row) const;
  void dense(const Call& call, const void* weights, int64_t n, int64_t k, int64_t first,
             void* stream);
  void quantized_rows(const LinearWeights& weights, const Call& call, void* stream);
  void dequantized(const WeightPart& part, const Call& call, int64_t k, void* stream);
  void fp8(const LinearWeights& weights, const Call& call, void* stream);
  void fp8_small(const WeightPart& part, const Call& call, void* stream);
  void fp8_product(const WeightPart& part, const Call& call, int32_t first_row, int32_t rows,
                   void* stream);

  LinearOptions options_;
  std::optional<CublasLtGemm> library_;
  DeviceBuffer quantized_x_;
  DeviceBuffer values_;  // dequantized weights
  DeviceBuffer fp8_x_;   // codes of fp8_rows_ rows
  DeviceBuffer fp8_x_scales_;
  int32_t fp8_rows_ = 0;
};

}  // namespace sagellm::cuda
