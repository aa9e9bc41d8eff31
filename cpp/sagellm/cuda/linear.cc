#include "sagellm/cuda/linear.h"

#include <algorithm>

#include "sagellm/base/math.h"
#include "sagellm/kernels/cuda/fp8.h"
#include "sagellm/kernels/cuda/gemm.h"
#include "sagellm/kernels/cuda/quantized.h"

namespace sagellm::cuda {

namespace {

constexpr int64_t kValuesBytes = int64_t{64} << 20;
constexpr int64_t kFp8Bytes = int64_t{32} << 20;  // rows of x as FP8, at most
constexpr int64_t kFp8RowStep = 128;              // the tile of fp8_gemm
constexpr int64_t kMostFp8Rows = 8192;

std::byte* column(const Linear::Call& call, int64_t row, int64_t column) {
  return static_cast<std::byte*>(call.out) +
         (row * call.out_stride + column) * float_type_bytes(call.out_type);
}

}  // namespace

const void* Linear::x_row(const Call& call, int64_t row) const {
  return static_cast<const std::byte*>(call.x) +
         row * call.x_stride * float_type_bytes(options_.type);
}

Linear::Linear(const LinearOptions& options) : options_(options) {
  if (options.library != nullptr) library_.emplace(options.library);
  if (options.max_k > 0) {
    quantized_x_ =
        DeviceBuffer(static_cast<size_t>(kernels::cuda::quantized_rows_bytes(options.max_k)));
  }
  int64_t values_k = options.max_k;  // of weights that are written out
  if (options.max_fp8_k > 0 && options.fp8_tensor_cores) {
    fp8_rows_ = static_cast<int32_t>(std::clamp(
        kFp8Bytes / options.max_fp8_k / kFp8RowStep * kFp8RowStep, kFp8RowStep, kMostFp8Rows));
    fp8_x_ = DeviceBuffer(static_cast<size_t>(fp8_rows_ * options.max_fp8_k));
    fp8_x_scales_ = DeviceBuffer(static_cast<size_t>(fp8_rows_) * sizeof(float));
  } else {
    values_k = std::max(values_k, options.max_fp8_k);
  }
  if (values_k == 0 || options.deterministic) return;
  const int64_t tile = values_k * kernels::cuda::kTileRows * float_type_bytes(options.type);
  values_ = DeviceBuffer(static_cast<size_t>(std::max(kValuesBytes, tile)));
}

void Linear::operator()(const LinearWeights& weights, const Call& call, void* stream) {
  const bool few = options_.deterministic || call.rows <= kFewRows;
  bool any_quantized = false;
  bool any_fp8 = false;
  for (const WeightPart& part : weights.parts) {
    any_quantized |= part.is_quantized;
    any_fp8 |= part.is_fp8;
    if (part.is_quantized || part.is_fp8) {
      if (part.is_quantized && !few) dequantized(part, call, weights.k, stream);
    } else {
      dense(call, part.dense, part.n, weights.k, part.first, stream);
    }
  }
  if (any_quantized && few) quantized_rows(weights, call, stream);
  if (any_fp8) fp8(weights, call, stream);
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
    x.x = x_row(call, row);
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
    const auto num_rows = static_cast<int32_t>(std::min(step, part.n - first));
    if (part.is_fp8) {
      kernels::cuda::Fp8DequantizeParams p;
      p.weights = part.fp8;
      p.out = values_.data();
      p.out_type = options_.type;
      p.first_row = static_cast<int32_t>(first);
      p.num_rows = num_rows;
      kernels::cuda::fp8_dequantize(p, stream);
    } else {
      kernels::cuda::DequantizeParams p;
      p.weights = part.quantized;
      p.out = values_.data();
      p.out_stride = k;
      p.out_type = options_.type;
      p.first_row = static_cast<int32_t>(first);
      p.num_rows = num_rows;
      p.num_columns = static_cast<int32_t>(k);
      kernels::cuda::dequantize(p, stream);
    }
    dense(call, values_.data(), num_rows, k, part.first + first, stream);
  }
}

void Linear::fp8(const LinearWeights& weights, const Call& call, void* stream) {
  const auto each = [&](const auto& multiply) {
    for (const WeightPart& part : weights.parts) {
      if (part.is_fp8) multiply(part);
    }
  };
  const bool small = call.rows <= kSmallRows && !options_.deterministic;
  if (!options_.fp8_tensor_cores && call.rows > kFewRows && !options_.deterministic) {
    each([&](const WeightPart& part) { dequantized(part, call, weights.k, stream); });
  } else if (small || !options_.fp8_tensor_cores) {
    each([&](const WeightPart& part) { fp8_small(part, call, stream); });
  } else {
    for (int32_t row = 0; row < call.rows; row += fp8_rows_) {
      kernels::cuda::Fp8QuantizeParams x;
      x.x = x_row(call, row);
      x.x_stride = call.x_stride;
      x.codes = fp8_x_.as<uint8_t>();
      x.scales = fp8_x_scales_.as<float>();
      x.m = std::min(fp8_rows_, call.rows - row);
      x.k = static_cast<int32_t>(weights.k);
      kernels::cuda::fp8_quantize(options_.type, x, stream);
      each([&](const WeightPart& part) { fp8_product(part, call, row, x.m, stream); });
    }
  }
}

void Linear::fp8_small(const WeightPart& part, const Call& call, void* stream) {
  for (int32_t row = 0; row < call.rows; row += kSmallRows) {
    kernels::cuda::Fp8SmallLinearParams p;
    p.weights = part.fp8;
    p.type = options_.type;
    p.x = x_row(call, row);
    p.x_stride = call.x_stride;
    p.out = column(call, row, part.first);
    p.out_stride = call.out_stride;
    p.out_type = call.out_type;
    p.m = std::min(kSmallRows, call.rows - row);
    kernels::cuda::fp8_small_linear(p, stream);
  }
}

void Linear::fp8_product(const WeightPart& part, const Call& call, int32_t first_row, int32_t rows,
                         void* stream) {
  kernels::cuda::Fp8GemmParams p;
  p.weights = part.fp8;
  p.x = fp8_x_.as<uint8_t>();
  p.x_scales = fp8_x_scales_.as<float>();
  p.out = column(call, first_row, part.first);
  p.out_stride = call.out_stride;
  p.m = rows;
  p.n = part.fp8.n;
  if (library_ && library_->fp8(call.out_type, p, stream)) return;
  kernels::cuda::fp8_gemm(call.out_type, p, stream);
}

}  // namespace sagellm::cuda
