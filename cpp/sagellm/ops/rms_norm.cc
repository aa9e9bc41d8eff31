#include "sagellm/ops/rms_norm.h"

#include "sagellm/runtime/op_table.h"
#include "sagellm/tensor/matcher.h"

namespace sagellm::ops {

void rms_norm(const ConstTensorView& x, const ConstTensorView& weight, float eps,
              const TensorView& out) {
  require<InvalidArgument>(eps >= 0.f, "rms_norm: eps is ", eps, ", must not be negative");
  Matcher match("rms_norm", x.device);
  match.tensor("x", x, ElementType::kF32, {"rows", "n"});
  match.tensor("weight", weight, ElementType::kF32, {"n"});
  match.tensor("out", out, ElementType::kF32, {"rows", "n"});
  kernels::RmsNormParams p;
  p.num_rows = match["rows"];
  p.n = match["n"];
  p.eps = eps;
  p.x = x.as<float>();
  p.x_stride = x.strides[0];
  p.weight = weight.as<float>();
  p.out = out.as<float>();
  p.out_stride = out.strides[0];
  runtime::op_table(x.device).rms_norm(x.device, p);
}

}  // namespace sagellm::ops
