#include "sagellm/ops/rope.h"

#include "sagellm/runtime/op_table.h"
#include "sagellm/tensor/matcher.h"

namespace sagellm::ops {

void rope(const TensorView& x, const ConstTensorView& cos, const ConstTensorView& sin) {
  Matcher match("rope", x.device);
  match.tensor("x", x, ElementType::kF32, {"tokens", "heads", "head_dim"});
  match.tensor("cos", cos, ElementType::kF32, {"tokens", "half"});
  match.tensor("sin", sin, ElementType::kF32, {"tokens", "half"});
  require<InvalidArgument>(2 * match["half"] <= match["head_dim"], "rope: axis 1 of cos is ",
                           match["half"], ", must be at most half of head_dim ", match["head_dim"]);
  kernels::RopeParams p;
  p.num_tokens = match["tokens"];
  p.num_heads = match["heads"];
  p.head_dim = match["head_dim"];
  p.half = match["half"];
  p.x = x.as<float>();
  p.x_stride = x.strides[0];
  p.cos = cos.as<float>();
  p.cos_stride = cos.strides[0];
  p.sin = sin.as<float>();
  p.sin_stride = sin.strides[0];
  runtime::op_table(x.device).rope(x.device, p);
}

}  // namespace sagellm::ops
