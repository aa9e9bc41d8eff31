#include "sagellm/cuda/linear.h"

#include <algorithm>

#include "sagellm/base/math.h"
#include "sagellm/kernels/cuda/gemm.h"
#include "sagellm/kernels/cuda/quantized.h"

namespace sagellm::cuda {

namespace {

constexpr int64_t kValuesBytes = int64_t{64} << 20;

std::byte* column(const Linear::Call& call, int64_t row, int64_t column) {
  return static_cast<std::byte*>(call.out) +
         (row * call.out_stride + column) * float_type_bytes(call.out_type);
}

}  // namespace

Linear::Linear(const LinearOptions& options) : options_(options) {
  if (options.library != nullptr) library_.emplace(options.library);
  if (options.max_k == 0) return;
  quantized_x_ =
      DeviceBuffer(static_cast<size_t>(kernels::cuda::quantized_rows_bytes(options.max_k)));
  if (options.deterministic) return;
  const int64_t tile = options.max_k * kernels::cuda::kTileRows * float_type_bytes(options.type);
  values_ = DeviceBuffer(static_cast<size_t>(std::max(kValuesBytes, tile)));
}

void Linear::operator()(const LinearWeights& weights, const Call& call, void* stream) {
  const bool few = options_.deterministic || call.rows <= kFewRows;
  bool any_quantized = false;
  for (const WeightPart& part : weights.parts) {
    any_quantized |= part.is_quantized;
    if (!part.is_quantized) {
      dense(call, part.dense, part.n, weights.k, part.first, stream);
    } else if (!few) {
      dequantized(part, call, weights.k, stream);
    }
  }
  if (any_quantized && few) quantized_rows(weights, call, stream);
}

void Linear::dense(const Call& call, const void* weights, int64_t n, int64_t k, int64_t first,
                   void* stream) {
  if (call.rows <= kSmallRows && !options_.deterministic) {
    kernels::cuda::SmallLinearParams p;
    p.type = options_.type;
    p.out_type = call.out_type;
    p.x = call.x;
    p.x_stride = call.x_stride;
    p.weights = weights;
    p.weights_stride = k;
    p.out = column(call, 0, first);
    p.out_stride = call.out_stride;
    p.m = call.rows;
    p.n = static_cast<int32_t>(n);
    p.k = static_cast<int32_t>(k);
    kernels::cuda::small_linear(p, stream);
    return;
  }
  kernels::cuda::GemmParams p;
  p.x = call.x;
  p.x_stride = call.x_stride;
  p.weights = weights;
  p.weights_stride = k;
  p.out = column(call, 0, first);
  p.out_stride = call.out_stride;
  p.m = call.rows;
  p.n = static_cast<int32_t>(n);
  p.k = static_cast<int32_t>(k);
  if (library_) {
    (*library_)(options_.type, call.out_type, p, stream);
  } else {
    kernels::cuda::gemm(options_.type, call.out_type, p, stream);
  }
}

void Linear::quantized_rows(const LinearWeights& weights, const Call& call, void* stream) {
  for (int32_t row = 0; row < call.rows; row += kernels::cuda::kQuantColumns) {
    kernels::cuda::QuantizeRowsParams x;
    x.x = static_cast<const std::byte*>(call.x) +
          row * call.x_stride * float_type_bytes(options_.type);
    x.x_stride = call.x_stride;
    x.data = quantized_x_.as<uint8_t>();
    x.m = std::min(kernels::cuda::kQuantColumns, call.rows - row);
    x.k = static_cast<int32_t>(weights.k);
    kernels::cuda::quantize_rows(options_.type, x, stream);
    for (const WeightPart& part : weights.parts) {
      if (!part.is_quantized) continue;
      kernels::cuda::QuantizedLinearParams p;
      p.weights = part.quantized;
      p.x = x.data;
      p.out = column(call, row, part.first);
      p.out_stride = call.out_stride;
      p.out_type = call.out_type;
      p.m = x.m;
      kernels::cuda::quantized_linear(p, stream);
    }
  }
}

void Linear::dequantized(const WeightPart& part, const Call& call, int64_t k, void* stream) {
  const int64_t row_size = k * float_type_bytes(options_.type);
  constexpr int64_t tile = kernels::cuda::kTileRows;
  const int64_t step = static_cast<int64_t>(values_.size()) / row_size / tile * tile;
  for (int64_t first = 0; first < part.n; first += step) {
    kernels::cuda::DequantizeParams p;
    p.weights = part.quantized;
    p.out = values_.data();
    p.out_stride = k;
    p.out_type = options_.type;
    p.first_row = static_cast<int32_t>(first);
    p.num_rows = static_cast<int32_t>(std::min(step, part.n - first));
    p.num_columns = static_cast<int32_t>(k);
    kernels::cuda::dequantize(p, stream);
    dense(call, values_.data(), p.num_rows, k, part.first + first, stream);
  }
}

}  // namespace sagellm::cuda
