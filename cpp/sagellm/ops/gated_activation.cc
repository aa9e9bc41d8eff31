#include "sagellm/ops/gated_activation.h"

#include "sagellm/runtime/op_table.h"
#include "sagellm/tensor/matcher.h"

namespace sagellm::ops {

void gated_activation(kernels::GateActivation activation, const ConstTensorView& gate,
                      const ConstTensorView& up, const TensorView& out) {
  Matcher match("gated_activation", gate.device);
  match.tensor("gate", gate, ElementType::kF32, {"rows", "n"});
  match.tensor("up", up, ElementType::kF32, {"rows", "n"});
  match.tensor("out", out, ElementType::kF32, {"rows", "n"});
  kernels::GatedActivationParams p;
  p.activation = activation;
  p.num_rows = match["rows"];
  p.n = match["n"];
  p.gate = gate.as<float>();
  p.gate_stride = gate.strides[0];
  p.up = up.as<float>();
  p.up_stride = up.strides[0];
  p.out = out.as<float>();
  p.out_stride = out.strides[0];
  runtime::op_table(gate.device).gated_activation(gate.device, p);
}

}  // namespace sagellm::ops
