#include "sagellm/ops/linear.h"

#include "sagellm/runtime/op_table.h"
#include "sagellm/tensor/matcher.h"

namespace sagellm::ops {

namespace {

/// Columns of a packed matrix come in multiples of this.
constexpr int64_t column_unit(kernels::PackedFormat format) {
  using enum kernels::PackedFormat;
  if (format == kF32 || format == kF16 || format == kBF16 || format == kF8) return 1;
  if (format == kQ4_K || format == kQ5_K || format == kQ6_K) return 256;
  return kernels::kUnit;
}

}  // namespace

LinearWeight weight_of(const quant::PackedMatrix& matrix) {
  return {matrix.format, matrix.storage.data(), matrix.n, matrix.k, Device{}};
}

void linear(const LinearWeight& weight, const ConstTensorView& x, kernels::ActPrecision precision,
            const TensorView& out) {
  require<InvalidArgument>(weight.data != nullptr && weight.n > 0 && weight.k > 0 &&
                               weight.k % column_unit(weight.format) == 0,
                           "linear: weight [", weight.n, ", ", weight.k, "] of format ",
                           quant::packed_format_name(weight.format),
                           " is empty or not whole blocks of ", column_unit(weight.format),
                           " columns");
  Matcher match("linear", weight.device);
  match.bind("n", weight.n, "weight");
  match.bind("k", weight.k, "weight");
  match.tensor("x", x, ElementType::kF32, {"tokens", "k"});
  match.tensor("out", out, ElementType::kF32, {"tokens", "n"});
  kernels::LinearParams p;
  p.format = weight.format;
  p.weights = weight.data;
  p.n = weight.n;
  p.k = weight.k;
  p.precision = precision;
  p.num_tokens = match["tokens"];
  p.x = x.as<float>();
  p.x_stride = x.strides[0];
  p.out = out.as<float>();
  p.out_stride = out.strides[0];
  runtime::op_table(weight.device).linear(weight.device, p);
}

}  // namespace sagellm::ops
