// Matrix product with packed weights.
#pragma once

#include "sagellm/kernels/op_params.h"
#include "sagellm/quant/pack.h"
#include "sagellm/tensor/view.h"

namespace sagellm::ops {

/// A packed weight matrix [n, k] wherever it lives.
struct LinearWeight {
  kernels::PackedFormat format = kernels::PackedFormat::kF32;
  const void* data = nullptr;  // ceil(n / 16) row blocks, 64-byte aligned
  int64_t n = 0;
  int64_t k = 0;
  Device device;
};

/// A view of host memory that `matrix` owns.
LinearWeight weight_of(const quant::PackedMatrix& matrix);

/// out [tokens, n] = x [tokens, k] times the transposed weights; float32, `out` and `x` disjoint.
/// Quantized formats see x as `precision`. A row's result does not depend on the other rows.
/// Throws InvalidArgument naming the tensor and axis that do not fit.
void linear(const LinearWeight& weight, const ConstTensorView& x, kernels::ActPrecision precision,
            const TensorView& out);

}  // namespace sagellm::ops
