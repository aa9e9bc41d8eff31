// Linear layers on the tensor cores, without a library.
#pragma once

#include <cstdint>

#include "sagellm/kernels/cuda/float_type.h"

namespace sagellm::kernels::cuda {

/// out[i, j] = sum over l of x[i, l] * weights[j, l], plus bias[j]. All addresses are multiples of
/// 16 bytes, as are the rows of x and weights.
struct GemmParams {
  const void* x = nullptr;        // [m][x_stride]
  int64_t x_stride = 0;           // in elements, a multiple of 8
  const void* weights = nullptr;  // [n][weights_stride]
  int64_t weights_stride = 0;     // in elements, a multiple of 8
  const void* bias = nullptr;     // [n] of the input type, or null
  void* out = nullptr;            // [m][out_stride]
  int64_t out_stride = 0;         // in elements
  int32_t m = 0;
  int32_t n = 0;
  int32_t k = 0;  // a multiple of 8
};

/// Queues the product on `stream`. `input` is kBF16 or kF16; `output` is the same or kF32. Every
/// sum runs over l in ascending steps of 16 in one chain, so that an element of the result depends
/// neither on m nor on the other rows: a row alone gives the same bits as in any batch.
void gemm(FloatType input, FloatType output, const GemmParams& params, void* stream);

}  // namespace sagellm::kernels::cuda
