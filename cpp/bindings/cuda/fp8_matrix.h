// FP8 matrices on arrays of a device, as the bindings of their kernels take them.
#pragma once

#include <cstdint>

#include "device_array.h"
#include "sagellm/kernels/cuda/fp8.h"

/// codes [n, k] uint8 and scales [groups, n] float32.
inline sagellm::kernels::cuda::Fp8Matrix fp8_matrix_of(const DeviceArray& codes,
                                                       const DeviceArray& scales) {
  using sagellm::InvalidArgument;
  using sagellm::require;
  namespace kernels = sagellm::kernels::cuda;
  require<InvalidArgument>(codes.shape().size() == 2 && scales.shape().size() == 2,
                           "codes and scales must have 2 axes");
  kernels::Fp8Matrix matrix;
  matrix.n = static_cast<int32_t>(codes.shape()[0]);
  matrix.k = static_cast<int32_t>(codes.shape()[1]);
  matrix.groups = static_cast<int32_t>(scales.shape()[0]);
  require<InvalidArgument>(matrix.k % kernels::kFp8Alignment == 0, "codes have ", matrix.k,
                           " columns; they must be a multiple of ", kernels::kFp8Alignment);
  const int32_t groups = (matrix.k + kernels::kFp8Group - 1) / kernels::kFp8Group;
  require<InvalidArgument>(
      (matrix.groups == 1 || matrix.groups == groups) && scales.shape()[1] == matrix.n,
      "scales have shape [", scales.shape()[0], ", ", scales.shape()[1], "], expected [1 or ",
      groups, ", ", matrix.n, "]");
  matrix.codes = codes.elements<uint8_t>("codes", int64_t{matrix.n} * matrix.k);
  matrix.scales = scales.elements<float>("scales", int64_t{matrix.groups} * matrix.n);
  return matrix;
}

/// A checked product of FP8 rows and FP8 weights, and the type of its result.
struct Fp8Product {
  sagellm::kernels::cuda::FloatType output = sagellm::kernels::cuda::FloatType::kF32;
  sagellm::kernels::cuda::Fp8GemmParams params;
};

/// `type` is what a result of 2 bytes holds.
inline Fp8Product fp8_product_of(const DeviceArray& x, const DeviceArray& x_scales,
                                 const DeviceArray& codes, const DeviceArray& scales,
                                 const DeviceArray& out, const std::string& type) {
  using sagellm::InvalidArgument;
  using sagellm::kernels::cuda::FloatType;
  Fp8Product product;
  sagellm::kernels::cuda::Fp8GemmParams& p = product.params;
  p.weights = fp8_matrix_of(codes, scales);
  sagellm::require<InvalidArgument>(x.shape().size() == 2 && x.shape()[1] == p.weights.k,
                                    "x must have 2 axes and ", p.weights.k, " columns");
  p.m = static_cast<int32_t>(x.shape()[0]);
  p.n = p.weights.n;
  p.x = x.elements<uint8_t>("x", x.size());
  p.x_scales = x_scales.elements<float>("x_scales", p.m);
  p.out_stride = p.n;
  const int64_t count = int64_t{p.m} * p.n;
  product.output = out.dtype().itemsize() == 4 ? FloatType::kF32 : float_type_of(type);
  p.out = product.output == FloatType::kF32 ? static_cast<void*>(out.elements<float>("out", count))
                                            : out.elements<uint16_t>("out", count);
  return product;
}
